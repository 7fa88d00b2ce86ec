"""The training and the measurement on composed pictures, with a tiny random language model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import edgekit
from edgekit.data.stamp_scenes import StampBook
from edgekit.data.stamps import build_stamps
from edgekit.errors import TrainingError, UsageError
from edgekit.eval.describing import DESCRIBE
from edgekit.eval.glyphs.methods import Method
from edgekit.eval.pictures import Annotated, read_pictures
from edgekit.eval.stamps.__main__ import main
from edgekit.eval.stamps.lessons import IGNORE, Lessons, padded
from edgekit.eval.stamps.methods import answered
from edgekit.eval.stamps.model import (
    IMAGE_TOKEN,
    TOKENS,
    assemble,
    begin_with_words,
    prompt_ids,
    trained,
    word_embeddings,
)
from edgekit.eval.stamps.training import METRICS, Precision, Training, read_metrics, train
from edgekit.export.pipeline import convert
from edgekit.models.spin import SpinConfig
from edgekit.runtime import load
from edgekit.sources import open_source
from edgekit.sources.picture_model import PictureModel, open_picture_model
from edgekit.testing import write_tiny_tokenizer
from edgekit.testing_stamps import write_stamp_archive

SMALL = Training(eye_steps=2, eye_batch=4, steps=4, batch=5, micro=2, warmup=2)
OPTIONS = ["--eye-steps", "2", "--eye-batch", "4", "--steps", "4", "--batch", "5", "--micro", "2"]
# A training that ends itself, as a kill does, when step 2 of the second stage begins.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from edgekit.data.stamp_scenes import StampBook
from edgekit.eval.stamps.lessons import Lessons
from edgekit.eval.stamps.model import assemble
from edgekit.eval.stamps.training import Training, train
from edgekit.sources import open_source

def told(stage, step, steps):
    if (stage, step) == ("words", 2):
        os.kill(os.getpid(), signal.SIGKILL)

text, data, out = map(Path, sys.argv[1:])
pictures = assemble(open_source(text), 0)
book = StampBook.read(data)
lessons = Lessons(pictures, book, seed=0, questions=0.25)
training = Training(eye_steps=2, eye_batch=4, steps=4, batch=5, micro=2, warmup=2)
train(pictures, lessons, training, out, objects=book.names, save_every=0.0, progress=told)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    write_stamp_archive(folder / "archives")
    build_stamps(folder / "data", folder / "archives", {"validation": 5, "test": 5})
    return folder / "data"


@pytest.fixture(scope="module")
def text(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model whose tokenizer has SmolLM2's spare token."""
    folder = tmp_path_factory.mktemp("text") / "tiny"
    shutil.copytree(tiny_checkpoint("llama", num_hidden_layers=2), folder)
    write_tiny_tokenizer(folder, added=[IMAGE_TOKEN])
    return folder


@pytest.fixture
def pictures(text: Path) -> PictureModel:
    return assemble(open_source(text), 0)


def lessons_of(pictures: PictureModel, data: Path, questions: float = 0.25) -> Lessons:
    return Lessons(pictures, StampBook.read(data), seed=0, questions=questions)


def teach(pictures: PictureModel, data: Path, training: Training, folder: Path) -> list[Any]:
    names = StampBook.read(data).names
    train(pictures, lessons_of(pictures, data), training, folder, objects=names)
    timed = read_metrics(folder / METRICS)
    return [{key: value for key, value in line.items() if key != "seconds"} for line in timed]


def test_the_projector_begins_as_what_the_eyes_know_in_words(
    pictures: PictureModel, data: Path, tmp_path: Path
) -> None:
    before = {n: p.detach().clone() for n, p in trained(pictures).items()}
    teach(pictures, data, Training(eye_steps=3, eye_batch=4, steps=0), tmp_path)
    names = StampBook.read(data).names
    words = word_embeddings(pictures, names)
    ids = pictures.tokenizer.encode(f" {names[7]}", add_special_tokens=False)
    table = pictures.model.get_input_embeddings().weight.detach()
    assert torch.allclose(words[7], table[ids].mean(dim=0))
    projector = pictures.model.model.multi_modal_projector
    said = projector.linear_2.weight[:, : len(names)].T  # a word's direction for each object
    likeness = torch.nn.functional.cosine_similarity(said, words)
    assert (likeness > 1 - 1e-5).all()
    assert not projector.linear_2.weight[:, len(names) :].any()
    assert not torch.equal(
        projector.linear_1.weight, before["model.multi_modal_projector.linear_1.weight"]
    )
    head = torch.nn.Linear(192, 2)
    begin_with_words(projector, head, torch.eye(2, said.shape[1]))
    seen = torch.randn(5, 192)
    spoken = projector(seen)
    logits = torch.nn.functional.gelu(head(seen))
    assert torch.allclose(spoken[:, :2], logits, atol=1e-6)
    assert not spoken[:, 2:].any()


def test_more_objects_than_channels_are_refused(pictures: PictureModel) -> None:
    projector = pictures.model.model.multi_modal_projector
    count = projector.linear_1.out_features + 1
    head = torch.nn.Linear(192, count)
    with pytest.raises(UsageError, match=f"{count} objects given; allowed: {count - 1}"):
        begin_with_words(projector, head, torch.zeros(count, count - 1))


def some(data: Path, count: int) -> list[Annotated]:
    return read_pictures(data / "test" / "pictures.jsonl")[:count]


def test_lessons_follow_from_their_step(pictures: PictureModel, data: Path) -> None:
    lessons = lessons_of(pictures, data, 0.5)
    found, again = lessons.said(1, 7, 12), lessons_of(pictures, data, 0.5).said(1, 7, 12)
    assert [(a.prompt, a.answer) for a in found] == [(a.prompt, a.answer) for a in again]
    assert torch.equal(*(lessons.pixels([a.image for a in part]) for part in (found, again)))
    assert [a.answer for a in found] != [a.answer for a in lessons.said(1, 8, 12)]
    told = [pictures.tokenizer.decode(lesson.answer) for lesson in found]
    assert {"Yes.", "No."} & set(told)
    assert any(answer.startswith("There is a") for answer in told)


def test_what_is_learnt_is_the_answer_alone(pictures: PictureModel, data: Path) -> None:
    lessons = lessons_of(pictures, data).said(1, 0, 5)
    ids, targets = padded(lessons, 2)
    assert ids.shape == targets.shape
    for row, lesson in enumerate(lessons):
        assert tuple(targets[row][targets[row] != IGNORE].tolist()) == lesson.answer
        assert tuple(ids[row].tolist()[: len(lesson.prompt)]) == lesson.prompt
        assert lesson.answer[-1] == pictures.model.generation_config.eos_token_id


def test_prompts_are_those_of_inference(pictures: PictureModel, data: Path) -> None:
    image = some(data, 1)[0].image
    given = pictures.inputs(pictures.prompt(DESCRIBE, 1), [image])
    ids = prompt_ids(pictures, DESCRIBE)
    assert given["input_ids"].tolist() == [ids]
    assert ids.count(pictures.model.config.image_token_id) == TOKENS


@pytest.mark.parametrize("micro", [1, 3])
def test_parts_of_a_batch_add_up(text: Path, data: Path, tmp_path: Path, micro: int) -> None:
    once = replace(SMALL, eye_steps=0, steps=1)
    found = [
        teach(assemble(open_source(text), 0), data, replace(once, micro=size), tmp_path / str(size))
        for size in (5, micro)
    ]
    for key in ("loss", "norm"):
        assert found[1][0][key] == pytest.approx(found[0][0][key], rel=1e-5)


def test_half_precision_is_near(text: Path, data: Path, tmp_path: Path) -> None:
    once = replace(SMALL, eye_steps=1, steps=1)
    whole, half = (
        teach(assemble(open_source(text), 0), data, replace(once, precision=p), tmp_path / p)
        for p in get_args(Precision)
    )
    for exact, rough in zip(whole, half, strict=True):
        assert rough["loss"] != exact["loss"]
        assert rough["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_only_eyes_and_projector_learn(pictures: PictureModel, data: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in pictures.model.state_dict().items()}
    teach(pictures, data, SMALL, tmp_path)
    after = pictures.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= set(trained(pictures))
    for part in ("patch_embedding", "layers.0.", "layers.5.", "multi_modal_projector"):
        assert any(part in name for name in changed)
    assert all("vision_tower" in name or "projector" in name for name in trained(pictures))


def test_eyes_learn(pictures: PictureModel, data: Path, tmp_path: Path) -> None:
    training = Training(eye_steps=16, eye_batch=8, steps=0, warmup=5)
    losses = [line["loss"] for line in teach(pictures, data, training, tmp_path)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])


def test_a_killed_training_goes_on_exactly(
    pictures: PictureModel, text: Path, data: Path, tmp_path: Path
) -> None:
    root = Path(edgekit.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(text), str(data), str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    metrics = tmp_path / "killed" / METRICS
    assert [(line["stage"], line["step"]) for line in read_metrics(metrics)][-1] == (1, 1)
    # What a kill in the middle of a write leaves, and a step that no checkpoint has.
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"stage": 1, "step": 2, "loss": 0.0}\n{"sta')
    resumed = teach(pictures, data, SMALL, tmp_path / "killed")
    other = assemble(open_source(text), 0)
    straight = teach(other, data, SMALL, tmp_path / "straight")
    assert len(straight) == 6
    assert resumed == straight
    for name, tensor in trained(other).items():
        assert torch.equal(tensor, trained(pictures)[name])
    with pytest.raises(TrainingError, match=r"of other settings \(rate"):
        teach(pictures, data, replace(SMALL, rate=1e-3), tmp_path / "killed")


def test_answers_do_not_depend_on_the_batch(pictures: PictureModel, data: Path) -> None:
    asked = [(DESCRIBE, picture.image) for picture in some(data, 3)]
    asked.append(("Is there a dog in the image?", asked[0][1]))
    plain = answered(pictures, asked, Method(), limit=8)
    alone = answered(pictures, asked, Method(), limit=8, batch=1)
    assert plain.texts == alone.texts
    assert alone.passes == alone.tokens == plain.tokens >= plain.passes
    for question, image in asked:
        said = pictures.answer(question, [image], max_new_tokens=8)
        assert said == plain.texts[asked.index((question, image))]
    inert = answered(pictures, asked, Method(spin=SpinConfig(suppress=0)), limit=8)
    contrast = answered(pictures, asked, Method(), limit=8, contrast=0.0)
    assert inert.texts == contrast.texts == plain.texts


def test_methods_answer_differently(pictures: PictureModel, data: Path) -> None:
    asked = [(DESCRIBE, picture.image) for picture in some(data, 4)]
    strong = SpinConfig(suppress=3, alpha=0.0)
    found = {
        control: answered(pictures, asked, Method(spin=strong, control=control), limit=12).texts
        for control in ("none", "random", "inverted")
    }
    found["plain"] = answered(pictures, asked, Method(), limit=12).texts
    found["contrast"] = answered(pictures, asked, Method(), limit=12, contrast=3.0).texts
    assert len(set(found.values())) == len(found)


def test_the_command_trains_measures_and_leaves_a_model(
    text: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    small = ["--scenes", "2", "--asked", "2", "--tokens", "10", "--suppress", "1"]
    command = ["-o", str(out), "--data", str(data), "--text", str(text), *OPTIONS, *small]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "not a published model" in first
    rows = [line.split(" | ")[0].strip("| ") for line in first.splitlines() if line[:1] == "|"]
    methods = ["baseline", "mass", "logit", "random", "inverted", "contrast"]
    assert rows == [
        "method",
        "---",
        *methods,
        "method",
        "---",
        *(m for m in methods for _ in "123"),
    ]
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert found["methods"]["mass"]["spin"]["suppress"] == 1
    assert found["methods"]["contrast"]["pope"]["adversarial"]["questions"] > 0
    assert (out / "loss.png").stat().st_size > 1000
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert main([*command, "--seed", "1"]) == 2
    assert "of other settings; give another folder" in capsys.readouterr().err
    convert(out / "model", tmp_path / "bundle", formats=("openvino",), weights="fp32", verify=False)
    image = some(data, 1)[0].image
    bundle = load(tmp_path / "bundle")
    prompt = bundle.chat_prompt([{"role": "user", "content": DESCRIBE}], images=1)
    said = bundle.generate(prompt, images=[image], max_new_tokens=6)
    pictures = open_picture_model(open_source(out / "model"))
    assert said == pictures.answer(DESCRIBE, [image], max_new_tokens=6)


def test_language_models_that_cannot_do_are_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    with pytest.raises(UsageError, match="has no token <filename>"):
        assemble(open_source(tiny_checkpoint("llama")), 0)
    with pytest.raises(UsageError, match="questions 2 given; allowed: 0 to 1"):
        Training(questions=2)
