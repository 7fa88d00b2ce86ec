"""`edgekit spin`: settings from pictures, kept after a kill, and folded into a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgekit.cli.main import main
from edgekit.eval.calibration_files import read_calibration
from edgekit.sources import open_source
from edgekit.sources.picture_model import open_picture_model
from edgekit.spin.presets import preset_names, read_spin
from edgekit.testing_vlm import write_tiny_vlm

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vlm") / "source"
    write_tiny_vlm(out, "llava")
    return out


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Objects are single letters, which a random model does name."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    names, lines = [*"abcdefghijklmnopqrstuvwxyz0123456789"], []
    for number in range(8):
        values = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        objects = [names[i] for i in rng.permutation(len(names))[:18]]
        lines.append(json.dumps({"image": f"{number}.png", "objects": objects}))
    (folder / "pictures.jsonl").write_text("\n".join(lines))
    (folder / "vocabulary.txt").write_text("\n".join(names))
    flags = ["--pictures", folder / "pictures.jsonl", "--vocabulary", folder / "vocabulary.txt"]
    return [*map(str, flags), "--max-new-tokens", "24", "--suppress", "1,2", "--alpha", "0,0.5"]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def calibrated(vlm: Path, annotated: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    assert main(["spin", "calibrate", str(vlm), "-o", str(out), *annotated, "--json"]) == 0
    return out


def test_suggestion_is_the_best_that_holds(calibrated: Path) -> None:
    found = read_calibration(calibrated)
    plain, *trials = found.trials
    assert len(trials) == 8  # two counts, two factors, two ranges of layers
    holding = [
        trial.figures.c_i
        for trial in trials
        if trial.figures.c_i < plain.figures.c_i and trial.figures.f1 >= plain.figures.f1 - 0.005
    ]
    assert (found.spin is None) == (not holding)
    assert found.spin is not None, "the fixture's pictures must give a suggestion"
    best = next(trial for trial in trials if trial.spin == found.spin)
    assert best.figures.c_i == min(holding)
    assert read_spin(calibrated / "spin.toml") == found.spin
    assert (calibrated / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert set(found.test) == {"plain", "spin", "static"}
    first, end = found.spin.layers or (0, 0)
    assert set(found.heads) == {str(layer) for layer in range(first, end)}
    for layer, shares in found.frequency.items():
        assert sum(shares) == pytest.approx(found.spin.suppress)
        assert len(found.scores[layer]) == 4
    assert all(0 <= score <= 1 for row in found.scores.values() for score in row)


def test_killed_calibration_goes_on(
    vlm: Path, annotated: list[str], calibrated: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "answers").mkdir(parents=True)
    for path in sorted((calibrated / "answers").iterdir())[:4]:
        lines = path.read_bytes().splitlines(keepends=True)
        (out / "answers" / path.name).write_bytes(b"".join(lines[:3]) + lines[3][:9])
    code, text, _ = command("spin", "calibrate", vlm, "-o", out, *annotated)
    assert code == 0
    assert "Suggested: " in text
    assert read_calibration(out) == read_calibration(calibrated)


def test_fold(vlm: Path, calibrated: Path, command: Command, tmp_path: Path) -> None:
    """What is folded in speaks as the heads' outputs times alpha would."""
    found = read_calibration(calibrated)
    assert found.spin is not None
    out = tmp_path / "model"
    code, _, error = command("spin", "apply", vlm, calibrated, "-o", out, "--unvalidated")
    assert (code, error) == (0, "")
    before, after = (open_picture_model(open_source(path)) for path in (vlm, out))
    inputs = before.inputs(before.prompt("What is it?", 1), [_picture()])
    heads, alpha = found.heads, found.spin.alpha
    text = before.model.config.get_text_config(decoder=True)
    for layer, module in enumerate(before.model.model.language_model.layers):
        factors = torch.ones(text.num_attention_heads)
        factors[list(heads.get(str(layer), ()))] = alpha
        module.self_attn.o_proj.register_forward_pre_hook(
            lambda _, given, f=factors: (
                given[0] * f.repeat_interleave(given[0].shape[-1] // len(f)),
            )
        )
    with torch.no_grad():
        difference = before.model(**inputs).logits - after.model(**inputs).logits
    assert difference.abs().max() <= 1e-5
    code, _, error = command("spin", "apply", vlm, calibrated, "-o", out, "--unvalidated")
    assert code == 1
    assert "exists already" in error


def test_unvalidated_heads_do_not_ship(
    vlm: Path, calibrated: Path, command: Command, tmp_path: Path
) -> None:
    data = json.loads((calibrated / "calibration.json").read_text())
    (tmp_path / "calibration.json").write_text(json.dumps(data | {"static_holds": False}))
    code, _, error = command("spin", "apply", vlm, tmp_path, "-o", tmp_path / "model")
    assert code == 2
    assert "were not better than the plain model" in error
    assert not (tmp_path / "model").exists()


def test_bad_input(
    vlm: Path, annotated: list[str], command: Command, tmp_path: Path, tiny_checkpoint: Any
) -> None:
    out = tmp_path / "out"
    given = ["spin", "calibrate", vlm, "-o", out, *annotated]
    for arguments, message in (
        ([*given, "--suppress", "4"], "suppress 4 given for 4 heads"),
        ([*given, "--layers", "0,9"], "layers 0 to 9 given; allowed: up to 2"),
        ([*given, "--layers", "0"], "allowed: two numbers, such as 0,16"),
        ([*given, "--alpha", "x"], "allowed: numbers, such as 0,0.08"),
        ([*given[:2], tiny_checkpoint("llama"), *given[3:]], "reads no pictures"),
        (["spin", "apply", vlm, out, "-o", tmp_path / "m"], "calibration.json: cannot be read"),
    ):
        code, _, error = command(*arguments)
        assert code == 2
        assert message in error


def test_presets(command: Command) -> None:
    code, text, _ = command("spin", "presets")
    assert code == 0
    assert all(name in text for name in preset_names())


def _picture() -> Image.Image:
    values = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(values)
