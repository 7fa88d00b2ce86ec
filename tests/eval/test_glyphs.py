"""The glyph world: scenes, a model that learns them, and an experiment that runs and resumes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.__main__ import main
from edgekit.eval.glyphs.lawcat import LawcatModel, Ranking
from edgekit.eval.glyphs.methods import Method, contrasted_captions, said, spun_captions
from edgekit.eval.glyphs.model import Mixer, Training, new_model, prompt, train
from edgekit.models.decoder import Decoder
from edgekit.models.spin import SpinConfig
from edgekit.testing import TOLERANCE, assert_close

MIXERS: tuple[Mixer, ...] = ("softmax", "lawcat")


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


def pictures(count: int) -> torch.Tensor:
    rng = np.random.default_rng(3)
    return torch.from_numpy(np.stack([world.picture(rng, (1, 6)) for _ in range(count)]))


@pytest.mark.parametrize("mixer", MIXERS)
def test_methods_caption_differently(mixer: Mixer) -> None:
    model = new_model(1, mixer)
    train(model, Training(text_steps=20, picture_steps=10, batch=16, seed=1))
    pixels = pictures(12)
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


@torch.no_grad()
def test_spin_in_lawcat_is_that_of_the_decoder() -> None:
    model, spin = new_model(2, "lawcat").eval(), SpinConfig(suppress=3, alpha=0.1, layers=(1, 3))
    ids = torch.cat((prompt(2), torch.tensor([[3, world.AND], [9, world.AND]])), dim=1)
    plain = model(input_ids=ids, pixel_values=pictures(2)).logits
    with model.turned_down(spin):
        spun = model(input_ids=ids, pixel_values=pictures(2)).logits
        blind = model(input_ids=ids).logits
    expected = _decoded(model, ids, spin)
    assert_close("logits", expected, spun, ratio=TOLERANCE["float32"])
    assert not torch.allclose(plain, spun, atol=1e-2)
    assert_close("blind", model(input_ids=ids).logits, blind, ratio=TOLERANCE["float32"])
    assert torch.equal(model(input_ids=ids, pixel_values=pictures(2)).logits, plain)


def _decoded(model: LawcatModel, ids: torch.Tensor, spin: SpinConfig) -> torch.Tensor:
    """Logits of a decoder that has SPIN in its config."""
    decoder = Decoder(replace(model.text.config, spin=spin))
    decoder.load_state_dict(model.text.state_dict())
    caught: list[torch.Tensor] = []
    hook = model.text.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    model(input_ids=ids, pixel_values=pictures(len(ids)))
    hook.remove()
    logits: torch.Tensor = decoder(caught[0], image=ids == world.IMAGE)[0]
    return logits


@torch.no_grad()
def test_scores_of_lawcat_heads_can_be_watched_and_replaced() -> None:
    model, ids = new_model(2, "lawcat").eval(), prompt(2)
    spin, seen = SpinConfig(suppress=3, alpha=0.1, layers=(1, 3)), {}

    def logits(ranking: Ranking | None = None) -> torch.Tensor:
        with model.turned_down(spin, ranking, lambda layer, scores: seen.update({layer: scores})):
            found: torch.Tensor = model(input_ids=ids, pixel_values=pictures(2)).logits
            return found

    plain = logits()
    assert sorted(seen) == [1, 2]
    assert seen[1].shape == (2, world.PATCHES + 2, 8)
    assert ((seen[1] > 0) & (seen[1] <= 1)).all()
    assert torch.equal(logits(lambda scores: scores * 2), plain)
    assert not torch.allclose(logits(lambda scores: 1 - scores), plain, atol=1e-2)


@torch.no_grad()
def test_heads_of_lawcat_are_folded_away() -> None:
    model, folded = new_model(2, "lawcat").eval(), new_model(2, "lawcat").eval()
    folded.fold_static({1: [0, 5]}, 0.25)
    layer = model.text.layers[1].self_attn
    heads = torch.randn(3, 8, 8)
    turned = heads.clone()
    turned[:, [0, 5]] *= 0.25
    actual = folded.text.layers[1].self_attn.o_proj(heads.flatten(1))
    assert_close("mixed", layer.o_proj(turned.flatten(1)), actual, ratio=TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("mixer", "scores"), [("softmax", ["mass", "logit"]), ("lawcat", ["mass"])]
)
def test_the_experiment_goes_on_where_it_was(
    mixer: str, scores: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = ["--mixer", mixer, "--seeds", "0"]
    arguments = ["-o", str(tmp_path), *seed, "--scenes", "3", "--smoke"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert f"Glyph world, {mixer}, seeds 0" in first
    names = ["baseline", *scores, "random", "inverted", "static", "contrast"]
    rows = [line.split(" | ")[0].strip("| ") for line in first.splitlines() if line[:1] == "|"]
    assert rows[2:] == names
    model = tmp_path / "seed-0" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    (tmp_path / "seed-0" / "results.json").unlink()
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert model.stat().st_mtime_ns == before
    tokenizer = tmp_path / "seed-0" / ("model" if mixer == "softmax" else "base") / "tokenizer.json"
    tokenizer.unlink()
    assert main(arguments) == 0
    assert tokenizer.is_file()
    assert model.stat().st_mtime_ns == before
    capsys.readouterr()
    assert main([*arguments[:-2], "4", "--smoke"]) == 2
    assert "of other settings; give another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_spin_invents_fewer_objects(tmp_path: Path) -> None:
    assert main(["-o", str(tmp_path), "--seeds", "0,1,2"]) == 0
    files = [tmp_path / f"seed-{seed}" / "results.json" for seed in range(3)]
    found = [json.loads(file.read_text(encoding="utf-8"))["methods"] for file in files]

    def mean(method: str, figure: str) -> float:
        return float(np.mean([methods[method][figure] for methods in found]))

    assert mean("baseline", "recall") > 0.9
    assert mean("mass", "c_i") <= 0.8 * mean("baseline", "c_i")
    assert mean("mass", "f1") >= mean("baseline", "f1")
    assert mean("random", "c_i") == pytest.approx(mean("baseline", "c_i"), abs=0.03)
    assert mean("inverted", "c_i") > mean("baseline", "c_i")
