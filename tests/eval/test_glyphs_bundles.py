"""The glyph world's models as checkpoints, and bundles with PyTorch's captions on both engines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.config import dump
from edgekit.errors import SourceError
from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.bundles import main
from edgekit.eval.glyphs.checkpoint import completed
from edgekit.eval.glyphs.deployed import Spread, differences
from edgekit.eval.glyphs.experiment import TEST, Scenes
from edgekit.eval.glyphs.methods import Method, spun_captions
from edgekit.eval.glyphs.model import (
    MODEL,
    Mixer,
    Model,
    Training,
    load_model,
    new_model,
    prompt,
    train,
)
from edgekit.models.spin import SpinConfig
from edgekit.runtime.text import Tokenizer
from edgekit.sources import open_source
from edgekit.sources.picture_model import open_picture_model

SCENES = 12
# Stronger than any experiment chooses, so that a model of few steps captions differently.
STRONG: dict[Mixer, dict[str, SpinConfig]] = {
    "softmax": {
        "mass": SpinConfig(suppress=6, alpha=0.0),
        "logit": SpinConfig(suppress=6, alpha=0.1, layers=(0, 2), score="logit"),
    },
    "lawcat": {"mass": SpinConfig(suppress=6, alpha=0.0)},
}


def measured(folder: Path, mixer: Mixer) -> Model:
    """A seed's folder as the experiment leaves it, of a model of few steps."""
    seed = folder / "seed-1"
    model = new_model(1, mixer)
    train(model, Training(text_steps=20, picture_steps=10, batch=16, seed=1))
    model.save_pretrained(seed / MODEL)
    methods = {name: {"spin": dump(spin)} for name, spin in STRONG[mixer].items()}
    found = {
        "settings": {"mixer": mixer, "scenes": SCENES + 3},
        "methods": {"baseline": {"spin": None}, **methods, "static": methods["mass"]},
    }
    (seed / "results.json").write_text(json.dumps(found), encoding="utf-8")
    return load_model(seed / MODEL, mixer)


@pytest.mark.parametrize("mixer", ["softmax", "lawcat"])
def test_bundles_caption_as_pytorch_does(
    mixer: Mixer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = measured(tmp_path / "glyphs", mixer)
    arguments = [str(tmp_path / "glyphs"), "-o", str(tmp_path / "out"), "--scenes", str(SCENES)]
    assert main([*arguments, "--target", "generic-x86"]) == 0
    table = (tmp_path / "out" / "bundles.md").read_text(encoding="utf-8")
    assert table.strip() in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "bundles.json").read_text(encoding="utf-8"))
    places: dict[tuple[str, str], Any] = {(p["method"], p["engine"]): p for p in record["places"]}
    methods = {"baseline": Method(), **{n: Method(spin=s) for n, s in STRONG[mixer].items()}}
    assert len(places) == 3 * len(methods)
    assert table.count(f"{SCENES} of {SCENES} |") == 2 * len(methods)
    scenes = Scenes.of(TEST, SCENES + 3)
    scenes = Scenes(scenes.pixels[:SCENES], scenes.drawn[:SCENES])
    said = {name: spun_captions(model, scenes.pixels, m) for name, m in methods.items()}
    assert all(said[name] != said["baseline"] for name in STRONG[mixer])
    for (name, _), place in places.items():
        assert place["differences"] == []
        assert place["figures"] == dump(scenes.score(said[name]))


def test_a_checkpoint_reads_and_writes_captions(tmp_path: Path) -> None:
    new_model(0).save_pretrained(tmp_path / MODEL)
    checkpoint = completed(tmp_path, "softmax")
    model = open_picture_model(open_source(checkpoint.source))
    text = model.vision.prompt("<bos> with", np.zeros((1, 3), np.int64))
    assert model.tokenizer.encode_prompt(text).tolist() == prompt(1)[0].tolist()
    tokens = world.caption((3, 9))
    assert model.tokenizer.decode(tokens) == "with glyph03 and glyph09"
    assert model.tokenizer.encode("with a glyph00").tolist() == [world.WITH, world.EOS, 0]


@pytest.mark.parametrize(("mixer", "where"), [("softmax", MODEL), ("lawcat", "base")])
def test_a_checkpoint_is_made_once(mixer: Mixer, where: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such model"):
        completed(tmp_path, mixer)
    new_model(0, mixer).save_pretrained(tmp_path / MODEL)
    before = (tmp_path / MODEL / "model.safetensors").read_bytes()
    checkpoint = completed(tmp_path, mixer)
    assert checkpoint.source == tmp_path / where
    assert (checkpoint.student is None) == (mixer == "softmax")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert completed(tmp_path, mixer) == checkpoint
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    assert (tmp_path / MODEL / "model.safetensors").read_bytes() == before
    (checkpoint.source / "tokenizer.json").write_text("{")  # as a kill would leave it
    completed(tmp_path, mixer)
    assert Tokenizer(checkpoint.source).vocab_size == world.VOCABULARY


def test_where_captions_differ() -> None:
    model, pixels = new_model(1), Scenes.of(TEST, 6).pixels
    train(model, Training(text_steps=20, picture_steps=10, batch=16, seed=1))
    ours = spun_captions(model, pixels, Method())
    logits = [_logits(model, pixels[scene], caption[:2]) for scene, caption in enumerate(ours)]
    second = [int(row.topk(2).indices[1]) for row in logits]
    theirs = [[*caption[:2], token] for caption, token in zip(ours, second, strict=True)]
    found = differences(model, pixels, Method(), ours, [ours[0], *theirs[1:]])
    assert [(d.scene, d.position) for d in found] == [(scene, 2) for scene in range(1, 6)]
    assert [d.found for d in found] == second[1:]
    for difference, row in zip(found, logits[1:], strict=True):
        top = row.topk(2).values
        assert difference.expected == int(row.argmax())
        assert difference.gap == pytest.approx(float(top[0] - top[1]), abs=1e-5)
    cut = differences(model, pixels[:1], Method(), ours[:1], [ours[0][:2]])
    assert [(d.position, d.found) for d in cut] == [(2, world.EOS)]


@torch.no_grad()
def _logits(model: Model, pixels: torch.Tensor, caption: list[int]) -> torch.Tensor:
    ids = torch.cat((prompt(1), torch.tensor([caption])), dim=1)
    logits: torch.Tensor = model(input_ids=ids, pixel_values=pixels[None]).logits[0, -1]
    return logits


def test_spreads_in_words() -> None:
    spread = Spread.of([4.0, 1.0, 2.0, 3.0, 10.0])
    assert spread is not None
    assert spread.written(1) == "3.0 (2.0 to 4.0)"
    assert Spread.of([]) is None


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["-o", str(tmp_path / "out")]
    assert main([str(tmp_path), *output]) == 2
    assert "nothing measured in it" in capsys.readouterr().err
    assert main([str(tmp_path), *output, "--seeds", "4"]) == 2
    assert "seed-4/results.json: no such file" in capsys.readouterr().err
    assert main([str(tmp_path), *output, "--scenes", "0"]) == 2
    assert "scenes 0 given; allowed: 1 or more" in capsys.readouterr().err
