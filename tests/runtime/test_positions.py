"""Positions of three axes in numpy against transformers' `get_rope_index`."""

import numpy as np
import pytest
import torch

from edgekit.errors import UsageError
from edgekit.runtime.positions import following_positions, mrope_positions
from edgekit.testing_vlm import IMAGE, TinyVlm, tiny_vlm

GRIDS = np.array([[1, 4, 6], [1, 10, 2], [1, 2, 2], [1, 2, 14]])
SIZES = [6, 5, 1, 7]


@pytest.fixture(params=["qwen2-vl", "qwen2.5-vl"])
def vlm(request: pytest.FixtureRequest) -> TinyVlm:
    return tiny_vlm(request.param)


def row(*parts: int) -> list[int]:
    """So many text tokens, and where the number is negative, that image."""
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE] * SIZES[-part - 1] if part < 0 else [7] * part
    return ids


def padded(*rows: list[int], right: bool = False) -> tuple[np.ndarray, np.ndarray]:
    length = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), length), np.int64)
    for i, tokens in enumerate(rows):
        part = slice(len(tokens)) if right else slice(length - len(tokens), None)
        ids[i, part], mask[i, part] = tokens, 1
    return ids, mask


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize(
    "rows",
    [
        ([3, -1, 2, -2, 4], [1, -3, 1, -4, 2]),
        ([-1, 1, -2, 1, -3], [1, -4]),
        ([9], [-1, 1, -2, 5, -3, 1, -4, 1]),
    ],
    ids=["two each", "at the ends", "text alone"],
)
def test_positions_are_those_of_transformers(
    vlm: TinyVlm, rows: tuple[list[int], ...], right: bool
) -> None:
    ids, mask = padded(*(row(*parts) for parts in rows), right=right)
    given = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": torch.tensor(ids == IMAGE).int(),
        "image_grid_thw": torch.tensor(GRIDS),
    }
    theirs, deltas = vlm.model.model.get_rope_index(**given)
    positions, delta = mrope_positions(ids, GRIDS, IMAGE, mask=mask)
    assert positions.dtype == delta.dtype == np.int64
    assert np.array_equal(positions, theirs.numpy())
    assert np.array_equal(delta, deltas[:, 0].numpy())


def test_a_conversation_in_pieces_is_one_prompt() -> None:
    first, second = row(3, -1, 2, -2, 4), row(2, -3, 5)
    more = row(1, -4, 2)
    whole, delta = mrope_positions(np.array([[*first, 7, 7, *second, *more]]), GRIDS, IMAGE)
    one, after = mrope_positions(np.array([first]), GRIDS[:2], IMAGE)
    seen = np.array([len(first)])
    text = following_positions(seen, after, 2)
    two, later = mrope_positions(np.array([second]), GRIDS[2:3], IMAGE, seen=seen + 2, delta=after)
    three, last = mrope_positions(
        np.array([more]), GRIDS[3:], IMAGE, seen=seen + 2 + len(second), delta=later
    )
    assert np.array_equal(np.concatenate((one, text, two, three), axis=2), whole)
    assert np.array_equal(last, delta)


def test_adjacent_images_each_have_their_grid() -> None:
    positions, delta = mrope_positions(np.array([row(1, -3, -1, 1)]), GRIDS[[2, 0]], IMAGE)
    assert positions[1, 0].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5]
    assert positions[2, 0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert delta.tolist() == [6 - 9]


def test_other_merges() -> None:
    positions, _ = mrope_positions(np.array([[IMAGE] * 6]), np.array([[1, 6, 9]]), IMAGE, merge=3)
    assert positions[:, 0].tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]


def test_padding_may_hold_the_image_token() -> None:
    ids, mask = np.array([[IMAGE, IMAGE, 7, IMAGE]]), np.array([[0, 0, 1, 1]])
    positions, _ = mrope_positions(ids, GRIDS[2:3], IMAGE, mask=mask)
    assert positions[0, 0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        (row(1, -1), GRIDS[:0].tolist(), "more image tokens than images given"),
        (row(1, -3, 1, -3), GRIDS[2:3].tolist(), "more image tokens than images given"),
        (row(1, -1)[:-1], GRIDS[:1].tolist(), "an image of 2 x 3 merged patches has fewer tokens"),
        (row(1, -3, 1, -2), GRIDS[:1].tolist(), "an image of 2 x 3 merged patches has fewer"),
        (row(4), GRIDS[:2].tolist(), "2 of 2 images have no tokens"),
        (row(1, -1), [[2, 4, 6]], "allowed: images, whose time is 1"),
    ],
    ids=["none", "too many", "cut", "interrupted", "unread", "video"],
)
def test_what_does_not_fit(ids: list[int], grids: list[list[int]], message: str) -> None:
    given = np.array(grids, np.int64).reshape(-1, 3)
    with pytest.raises(UsageError, match=message):
        mrope_positions(np.array([ids]), given, IMAGE)
