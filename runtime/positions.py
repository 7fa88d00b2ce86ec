"""Positions of three axes, time, height and width, without torch (M-RoPE, arXiv 2409.12191).

The tokens of an image share one time; their height and width are those of its merged patches. What
follows an image goes on after the largest of its positions, so that positions fall behind the count
of tokens: by the delta that `mrope_positions` returns, 0 or less. B batch, T tokens.

Example:
    >>> ids, grid = np.array([[5, 9, 9, 9, 9, 6]]), np.array([[1, 4, 4]])
    >>> positions, delta = mrope_positions(ids, grid, image_token=9)
    >>> positions[:, 0].tolist()
    [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    >>> following_positions(np.array([6]), delta)[:, 0].tolist()
    [[4], [4], [4]]
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgekit.errors import UsageError

__all__ = ["following_positions", "mrope_positions"]

Ints = npt.NDArray[np.int64]


def mrope_positions(
    ids: Ints,
    grids: Ints,
    image_token: int,
    *,
    merge: int = 2,
    mask: Ints | None = None,
    seen: Ints | None = None,
    delta: Ints | None = None,
) -> tuple[Ints, Ints]:
    """Positions of a prompt's tokens, 0 on padding, and the delta of what follows them.

    Args:
        ids: tokens `[B, T]`.
        grids: time (1), height and width in patches of each image, in the order of rows and of
            their tokens, `[images, 3]`.
        image_token: stands for one merged patch of an image.
        merge: patches that are merged along each of height and width.
        mask: 1 for tokens, 0 for padding, `[B, T]`; None: no padding.
        seen: tokens of each row before these, `[B]`; None: none.
        delta: what an earlier call returned for them, `[B]`; None: there was no image.

    Returns:
        int64 `[3, B, T]`, and int64 `[B]`: a token after n others has the position n + delta.

    Raises:
        UsageError: if the image tokens are not those of the images, or one is a video.
    """
    if grids.size and (grids[:, 0] != 1).any():
        raise UsageError(f"grids {grids.tolist()} given; allowed: images, whose time is 1")
    tokens = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    before = np.zeros(len(ids), np.int64) if seen is None else seen
    starts = before if delta is None else before + delta
    images = iter([(int(h) // merge, int(w) // merge) for _, h, w in grids])
    positions, after = np.zeros((3, *ids.shape), np.int64), np.zeros(len(ids), np.int64)
    for row, there in enumerate(tokens):
        found, end = _row(ids[row, there] == image_token, images, int(starts[row]))
        positions[:, row, there] = found
        after[row] = end - before[row] - there.sum()
    unread = len(list(images))
    if unread:
        raise UsageError(f"{unread} of {len(grids)} images have no tokens; give each its own")
    return positions, after


def following_positions(seen: Ints, delta: Ints, time: int = 1) -> Ints:
    """Positions `[3, B, time]` of text after `seen [B]` tokens, given the images' `delta [B]`."""
    steps = (seen + delta)[:, None] + np.arange(time)
    return np.broadcast_to(steps, (3, *steps.shape)).astype(np.int64)


def _row(
    image: npt.NDArray[np.bool_], images: Iterator[tuple[int, int]], position: int
) -> tuple[Ints, int]:
    """Positions `[3, tokens]` from `position` on, and the one after them."""
    pieces, at = [np.zeros((3, 0), np.int64)], 0
    while at < len(image):
        if image[at]:
            height, width = _next(image[at:], images)
            rows, columns = np.divmod(np.arange(height * width), width)
            pieces.append(position + np.stack((np.zeros_like(rows), rows, columns)))
            position += max(height, width)
        else:
            ahead = np.flatnonzero(image[at:])
            text = int(ahead[0]) if len(ahead) else len(image) - at
            pieces.append(np.broadcast_to(position + np.arange(text), (3, text)))
            position += text
        at += pieces[-1].shape[1]
    return np.concatenate(pieces, axis=1), position


def _next(image: npt.NDArray[np.bool_], images: Iterator[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of the image whose tokens come first in `image`."""
    found = next(images, None)
    if found is None:
        raise UsageError("more image tokens than images given; give one token per merged patch")
    height, width = found
    if not image[: height * width].all() or len(image) < height * width:
        raise UsageError(
            f"an image of {height} x {width} merged patches has fewer tokens than that; "
            "give one token per merged patch"
        )
    return found
