from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.adapters.tune.plot import _grid, draw_freezes, draw_training
from edgekit.errors import UsageError

PNG = b"\x89PNG\r\n"


def event(step: int, layer: int, target: str, part: str) -> dict[str, Any]:
    parent = "mlp" if target == "up_proj" else "self_attn"
    module = f"model.layers.{layer}.{parent}.{target}"
    return {"step": step, "module": module, "part": part, "score": None}


FREEZES = [
    event(-1, 0, "q_proj", "aflora_A"),
    event(5, 1, "q_proj", "aflora_A"),
    event(7, 2, "up_proj", "aflora_A"),
    event(9, 1, "up_proj", "aflora_B"),
]


def test_squares_hold_the_steps() -> None:
    found = _grid(FREEZES, "A", ["q_proj", "up_proj"], 3)
    expected = [[-1, 5, np.nan], [np.nan, np.nan, 7]]
    np.testing.assert_array_equal(found, np.array(expected))
    assert np.nansum(_grid(FREEZES, "B", ["q_proj", "up_proj"], 3)) == 9


def test_heat_map_depends_on_the_steps(tmp_path: Path) -> None:
    pictures = []
    for name, freezes in (
        ("a", FREEZES),
        ("b", [*FREEZES[:-1], event(2, 1, "up_proj", "aflora_B")]),
    ):
        draw_freezes(freezes, tmp_path / name, steps=12, layers=3)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0].startswith(PNG)
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("count", [1, 100])
def test_curve(tmp_path: Path, count: int) -> None:
    records = [{"step": i, "loss": 1 / (i + 1), "trainable": 10} for i in range(count)]
    draw_training(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no heat map"):
        draw_freezes([], tmp_path / "a", steps=1, layers=1)
    with pytest.raises(UsageError, match="no curve"):
        draw_training([], tmp_path / "a")
    assert not list(tmp_path.iterdir())
