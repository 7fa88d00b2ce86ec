"""CHAIR and POPE of real models on tiny pictures, by the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.cli.main import main
from edgekit.errors import UsageError
from edgekit.eval.pictures import Annotated, read_pictures, read_questions, split
from edgekit.export.pipeline import convert
from edgekit.testing_vlm import write_tiny_vlm

OBJECTS = ("dog", "cat", "tree", "owl", "car")
Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_vlm(folder / "source", "llava-gqa")
    convert(
        folder / "source", folder / "bundle", weights="fp32", verify=False, target="generic-x86"
    )
    return {"source": folder / "source", "bundle": folder / "bundle"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    lines, rng = [], np.random.default_rng(0)
    for number in range(4):
        values = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        objects = OBJECTS[number : number + 2]
        lines.append(json.dumps({"image": f"{number}.png", "objects": objects}))
    (folder / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocabulary.txt").write_text("\n".join(OBJECTS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> dict[str, Any]:
        code = main([*(str(argument) for argument in arguments), "--json"])
        out, err = capfd.readouterr()
        return {"code": code, "err": err} if code else json.loads(out)

    return run


def test_bundle_and_source_say_the_same(
    models: dict[str, Path], pictures: Path, command: Command, tmp_path: Path
) -> None:
    said = {}
    for name, options in (
        ("source", []),
        ("bundle", ["--engine", "openvino"]),
        ("bundle", ["--engine", "onnx"]),
    ):
        out = tmp_path / f"{len(said)}.json"
        flags = ["--pictures", pictures / "pictures.jsonl", "--max-new-tokens", 6, "-o", out]
        flags += ["--vocabulary", pictures / "vocabulary.txt"]
        found = command("eval", models[name], "--task", "chair", *options, *flags)
        assert found["figures"]["captions"] == 4
        journal = out.with_suffix(".samples.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        said[str(out)] = [json.loads(line)["answer"] for line in journal]
    first, *others = said.values()
    assert all(first)
    assert others == [first, first]


def test_interrupted_measurement_goes_on(
    models: dict[str, Path], pictures: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "pope.json"
    flags = ["--pictures", pictures / "pictures.jsonl", "--split", "random", "-o", out]
    whole = command("eval", models["bundle"], "--task", "pope", *flags)
    assert whole["figures"]["questions"] == 16
    journal = out.with_suffix(".samples.jsonl")
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = json.loads(lines[1]) | {"answer": "Yes, there is."}
    journal.write_text(lines[0] + json.dumps(changed) + "\n", encoding="utf-8")
    again = command("eval", models["bundle"], "--task", "pope", *flags)
    assert again["figures"]["yes_ratio"] == pytest.approx(1 / 16 + whole["figures"]["yes_ratio"])
    other = command("eval", models["source"], "--task", "pope", *flags)
    assert "begun with other settings" in other["err"]


def test_spin_of_a_source(
    models: dict[str, Path], pictures: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "spin.toml").write_text("suppress = 2\nalpha = 0.0\n")
    flags = ["--pictures", pictures / "pictures.jsonl", "--max-new-tokens", 8]
    flags += ["--vocabulary", pictures / "vocabulary.txt", "--task", "chair"]
    said = []
    for extra in ([], ["--spin", tmp_path / "spin.toml"]):
        out = tmp_path / f"{len(said)}.json"
        command("eval", models["source"], *flags, *extra, "-o", out)
        said.append(out.with_suffix(".samples.jsonl").read_text().splitlines()[1:])
    assert said[0] != said[1]
    refused = command("eval", models["bundle"], *flags, "--spin", tmp_path / "spin.toml")
    assert "--spin given for a bundle, which has its own" in refused["err"]


def test_wrong_flags(models: dict[str, Path], pictures: Path, command: Command) -> None:
    flags = ["--pictures", pictures / "pictures.jsonl"]
    for arguments, message in (
        (["--task", "chair"], "needs pictures; give them with --pictures"),
        (["--task", "chair", *flags], "needs to know objects; give them with --vocabulary"),
        (["--task", "pope", *flags], "needs a text, and a label that is yes or no"),
        (["--task", "pope", *flags, "--question", "What?"], "allowed: with chair"),
    ):
        assert message in command("eval", models["bundle"], *arguments)["err"]


def test_splits() -> None:
    """Yes and no in equal numbers; what is not there is common, or common beside what is."""
    rows = [("dog", "cat")] * 5 + [("dog", "ball")] * 3 + [("tree",)] * 9 + [("dog",)]
    pictures = [Annotated(image=Path(f"{i}"), objects=row) for i, row in enumerate(rows)]
    asked = {kind: split(pictures, kind, each=2) for kind in ("random", "popular", "adversarial")}
    for questions in asked.values():
        assert len(questions) == 2 * len(rows)
        assert sum(q.there for q in questions) == len(rows)
    last = {kind: [q.text for q in questions][-1] for kind, questions in asked.items()}
    assert last["popular"] == "Is there a tree in the image?"
    assert last["adversarial"] == "Is there a cat in the image?"
    assert split(pictures, "random", seed=1) == split(pictures, "random", seed=1)
    with pytest.raises(UsageError, match="3 questions for each picture given"):
        split(pictures, "random", each=3)
    with pytest.raises(UsageError, match="none or all of the objects"):
        split(pictures[:1], "random")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no picture in it"),
        ("{", "line 1: no JSON"),
        ('{"objects": []}', 'needs an "image"'),
        ('{"image": "none.png", "objects": []}', "no such picture"),
        ('{"image": "a.png", "objects": "dog"}', 'needs "objects", a list of names'),
    ],
)
def test_bad_annotations(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_pictures(tmp_path / "a.jsonl")


def test_questions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    line = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    (question,) = read_questions(tmp_path / "a.jsonl")
    assert (question.text, question.there) == ("Is there a dog?", False)
