"""The glyph world: scenes, a model that learns them, and an experiment that runs and resumes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.__main__ import main
from edgekit.eval.glyphs.methods import Method, contrasted_captions, said, spun_captions
from edgekit.eval.glyphs.model import Training, new_model, train
from edgekit.models.spin import SpinConfig


def test_scenes_have_a_theme_and_hide_some_objects() -> None:
    rng = np.random.default_rng(1)
    scenes = [world.draw_scene(rng, world.LIKELY) for _ in range(2000)]
    assert all(1 <= len(s.mentioned) <= 8 and set(s.drawn) <= set(s.mentioned) for s in scenes)
    mentioned = sum(len(s.mentioned) for s in scenes)
    assert sum(len(s.drawn) for s in scenes) / mentioned == pytest.approx(0.6, abs=0.02)
    surprising = [world.draw_scene(rng, world.SURPRISING) for _ in range(500)]
    assert all(s.drawn == s.mentioned for s in surprising)


def test_captions_begin_with_the_theme() -> None:
    tokens = world.caption((3, 9, 8, 11))
    listed = [8, world.AND, 9, world.AND, 11, world.AND, 3]
    assert tokens == [world.BOS, world.WITH, *listed] + [world.EOS] * (world.CAPTION - 9)


def test_pictures_show_what_is_drawn() -> None:
    empty = world.picture(np.random.default_rng(2), ())
    assert empty.shape == (3, world.SIDE, world.SIDE)
    assert np.abs(empty.mean()) < 0.01
    shown = world.picture(np.random.default_rng(2), (4, 7))
    cells = np.abs(shown - empty).reshape(3, 4, 10, 4, 10).max(axis=(0, 2, 4))
    assert (cells > 0.5).sum() == 2


def test_chair_reads_tokens() -> None:
    found = said([3, world.AND, 5, world.AND, 3], (5, 6))
    assert (found.mentions, found.absent, found.found) == (("3", "5", "3"), 2, 1)


def test_a_model_learns() -> None:
    model = new_model(0)
    losses = train(model, Training(text_steps=30, picture_steps=30, batch=16))
    assert np.mean(losses[25:30]) < 0.8 * losses[0]
    assert np.mean(losses[-5:]) < losses[30]
    again = train(new_model(0), Training(text_steps=2, picture_steps=0, batch=16))
    assert again == losses[:2]


def test_methods_caption_differently() -> None:
    model = new_model(1)
    train(model, Training(text_steps=60, picture_steps=30, batch=16, seed=1))
    rng = np.random.default_rng(3)
    pixels = torch.from_numpy(np.stack([world.picture(rng, (1, 6)) for _ in range(12)]))
    strong = SpinConfig(suppress=6, alpha=0.0)
    plain = spun_captions(model, pixels, Method())
    assert spun_captions(model, pixels, Method(spin=SpinConfig(suppress=0))) == plain
    spun = [
        spun_captions(model, pixels, Method(spin=strong, control=control))
        for control in ("none", "inverted")
    ]
    assert spun[0] != plain
    assert spun[0] != spun[1]
    assert contrasted_captions(model, pixels, strength=0.0) == plain


def test_the_experiment_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-o", str(tmp_path), "--seeds", "0", "--scenes", "3", "--smoke"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    for name in ("baseline", "mass", "logit", "random", "inverted", "static", "contrast"):
        assert f"| {name} |" in first
    model = tmp_path / "seed-0" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    (tmp_path / "seed-0" / "results.json").unlink()
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert model.stat().st_mtime_ns == before
    assert main([*arguments[:-2], "4", "--smoke"]) == 2
    assert "of other settings; give another folder" in capsys.readouterr().err
