from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.eval.heatmap import draw_heatmap
from edgekit.eval.reader import Reader
from edgekit.eval.retrieval import Retrieval, RetrievalOptions, retrieval

Finder = Callable[..., Reader]


def measured(finder: Finder, answer: str | None = None, limit: int = 800) -> Retrieval:
    reader = finder(say=str if answer is None else lambda _: answer, limit=limit)
    asked = RetrievalOptions(task="passkey", lengths=(400, 700, 900), samples=(4,), depths=2)
    return retrieval(reader, asked)


def pixels(path: Path) -> np.ndarray:
    from matplotlib import image

    return (255 * image.imread(path)[..., :3]).astype(int)


def share_of(colour: tuple[int, int, int], picture: np.ndarray) -> float:
    return float((abs(picture - np.array(colour)).max(axis=-1) <= 3).mean())


YELLOW, VIOLET, GREY = (253, 231, 37), (68, 1, 84), (217, 217, 217)


def test_right_is_yellow_wrong_is_dark_and_unreadable_grey(finder: Finder, tmp_path: Path) -> None:
    draw_heatmap(measured(finder), tmp_path / "right.png")
    draw_heatmap(measured(finder, answer=" 0."), tmp_path / "wrong.png")
    right, wrong = pixels(tmp_path / "right.png"), pixels(tmp_path / "wrong.png")
    assert share_of(YELLOW, right) > 0.2 > 0.01 > share_of(YELLOW, wrong)
    assert share_of(VIOLET, wrong) > 0.2 > 0.01 > share_of(VIOLET, right)
    assert share_of(GREY, right) > 0.05


def test_nothing_readable_still_draws(finder: Finder, tmp_path: Path) -> None:
    draw_heatmap(measured(finder, limit=100), tmp_path / "none.png")
    assert share_of(GREY, pixels(tmp_path / "none.png")) > 0.1


def test_a_place_that_cannot_be_written(finder: Finder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none/x\.png: cannot be written"):
        draw_heatmap(measured(finder), tmp_path / "none" / "x.png")
