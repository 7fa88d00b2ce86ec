"""The loss plot: what is drawn shows in its pixels, and a failure leaves the old one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from edgekit.distill.plot import BLUE, GREEN, GREY, ORANGE, draw_losses
from edgekit.errors import UsageError


def transfer(steps: int, *, layers: int = 4, evaluate: bool = False) -> list[dict[str, Any]]:
    """Records of a stage 1, whose losses fall from 1."""
    records: list[dict[str, Any]] = []
    for step in range(steps):
        losses = [(1 + layer) / (1 + step) for layer in range(layers)]
        record = {"stage": 1, "step": step, "tokens": 512 * (step + 1), "layers": losses}
        record |= {"loss": sum(losses) / layers, "lr": 1e-2, "seconds": 1.0}
        records.append(record | ({"eval": {"perplexity": 90.0 - step}} if evaluate else {}))
    return records


def tuning(steps: int, *, evaluate: bool = False) -> list[dict[str, Any]]:
    """Records of a stage 2 with cross-entropy and KL."""
    shared = {"stage": 2, "lr": 1e-4, "seconds": 2.0}
    evaluated = {"eval": {"perplexity": 30.0}} if evaluate else {}
    return [
        {**shared, "step": s, "tokens": 512 * (s + 1), "loss": 3.5, "cross_entropy": 3.0, "kl": 0.5}
        | evaluated
        for s in range(steps)
    ]


def pixels(path: Path, colour: str) -> int:
    image = imread(path)[..., :3]
    return int((np.abs(image - np.array(to_rgb(colour))).max(axis=-1) < 0.01).sum())


def drawn(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> Path:
    draw_losses(records, tmp_path / "loss.png", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    return tmp_path / "loss.png"


@pytest.mark.parametrize("steps", [1, 2, 85, 400])
def test_a_stage_alone(tmp_path: Path, steps: int) -> None:
    path = drawn(tmp_path, transfer(steps))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pixels(path, BLUE) > 100
    assert pixels(path, ORANGE) == pixels(path, GREEN) == 0


def test_both_stages_are_wider_than_one_and_show_their_parts(tmp_path: Path) -> None:
    one = imread(drawn(tmp_path, transfer(50))).shape
    both = drawn(tmp_path, transfer(50) + tuning(90))
    assert imread(both).shape[1] > one[1]
    assert pixels(both, GREEN) > 100


def test_evaluations_get_a_panel_and_the_teacher_a_line(tmp_path: Path) -> None:
    plain = imread(drawn(tmp_path, transfer(50))).shape
    path = drawn(tmp_path, transfer(50, evaluate=True))
    assert imread(path).shape[0] > plain[0]
    assert pixels(path, ORANGE) > 100
    without = pixels(path, GREY)
    path = drawn(tmp_path, transfer(50, evaluate=True) + tuning(3, evaluate=True), teacher=20.0)
    assert pixels(path, GREY) > without + 100


def test_steps_without_a_loss_are_left_out(tmp_path: Path) -> None:
    records = transfer(20)
    whole = drawn(tmp_path, records).read_bytes()
    odd = [{**records[0], "loss": None}, {**records[0], "loss": float("nan")}]
    assert drawn(tmp_path, [*odd, *records]).read_bytes() == whole


@pytest.mark.parametrize("records", [[], [{"stage": 1, "step": 0, "tokens": 1, "loss": None}]])
def test_no_curve_leaves_the_old_one(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    (tmp_path / "loss.png").write_text("old")
    with pytest.raises(UsageError, match="no curve to draw"):
        draw_losses(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_text() == "old"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        draw_losses(transfer(3), tmp_path / "none" / "loss.png")
