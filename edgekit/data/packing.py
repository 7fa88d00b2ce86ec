"""Documents end to end, cut into rows: every token is predicted once an epoch, none is lost."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgekit.data.batch import IGNORE, Batch
from edgekit.data.tokens import Tokens

__all__ = ["Row", "Stream", "as_row", "stacked"]

Row = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # ids and targets, both [n]


class Stream:
    """Shuffled documents as one sequence, in rows of `length` tokens; the last may be shorter."""

    def __init__(self, documents: Sequence[Tokens], *, length: int, seed: int) -> None:
        """Join `documents` in an order that `seed` gives."""
        order = np.random.default_rng(seed).permutation(len(documents))
        none = Tokens(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))
        parts = [documents[i] for i in order] or [none]
        self._all = Tokens(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.learn for part in parts]),
        )
        self._length = length

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return len(self._all.ids)

    @property
    def rows(self) -> int:
        """Rows; each begins with the token that the one before it predicts last."""
        return -(-max(self.tokens - 1, 0) // self._length)

    def row(self, number: int) -> Row:
        """Ids and targets of one row."""
        start = number * self._length
        part = slice(start, start + self._length + 1)
        return as_row(Tokens(self._all.ids[part], self._all.learn[part]))


def as_row(tokens: Tokens) -> Row:
    """Each token but the last, and what follows it or `IGNORE`."""
    targets = np.where(tokens.learn[1:], tokens.ids[1:].astype(np.int64), IGNORE)
    return tokens.ids[:-1].astype(np.int64), targets


def stacked(rows: Sequence[Row], *, length: int, pad: int) -> Batch:
    """Rows of at most `length` tokens, padded at their ends."""
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    targets = np.full((len(rows), length), IGNORE, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.bool_)
    for i, (row, following) in enumerate(rows):
        ids[i, : len(row)], targets[i, : len(row)], mask[i, : len(row)] = row, following, True
    return Batch(ids=ids, targets=targets, mask=None if mask.all() else mask)
