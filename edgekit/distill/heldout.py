"""Perplexity of a student as it is, on text that it is not trained on: points of the curve."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from edgekit.kernels.kl_loss import vocabulary_loss
from edgekit.models.decoder import Decoder

__all__ = ["perplexity"]


@torch.no_grad()
def perplexity(
    decoder: Decoder,
    ids: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[object]],
    *,
    window: int,
) -> float:
    """Exp of the mean cross-entropy over windows that do not overlap, each from an empty state.

    Args:
        decoder: teacher or student, in any state of its training.
        ids: tokens `[N]`; what does not fill a window is left out.
        autocast: enters the precision of matrix products.
        window: tokens.
    """
    count = len(ids) // window
    total = 0.0
    for row in ids[: count * window].view(count, window):
        with autocast():
            hidden, _ = decoder.hidden(row[None, :-1])
            ce, _ = vocabulary_loss(hidden[0], decoder.lm_head.weight, row[1:])
        total += float(ce)
    return math.exp(total / (count * (window - 1)))
