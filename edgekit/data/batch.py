"""What training reads: rows of tokens, with what is to be predicted at each."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["IGNORE", "Batch"]

IGNORE = -100  # target of a position that predicts nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """N rows of T tokens.

    Attributes:
        ids: int64 `[N, T]`.
        targets: int64 `[N, T]`; the token that follows each position, or `IGNORE`.
        mask: bool `[N, T]`, False on the padding at a row's end; None when no row is padded.
    """

    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_] | None
