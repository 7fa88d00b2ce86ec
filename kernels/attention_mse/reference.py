"""How far a mixer's heads are from the teacher's: the loss of stage 1 (LAWCAT, arXiv 2509.18467).

    loss = sum over valid positions of (y - expected)^2          dloss/dy = 2 (y - expected)

A sum, not a mean: the caller divides by counts that may span processes.
"""

import torch

from edgekit.errors import UsageError
from edgekit.kernels.precision import widened

__all__ = ["attention_mse", "check_arguments"]


def attention_mse(
    y: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Summed squared difference over valid positions.

    Args:
        y: what the student says, `[B, T, ...]`.
        expected: what the teacher says, of the same shape; it gets no gradient.
        mask: 1 for tokens, 0 for padding, `[B, T]`, or None when nothing is padded. What stands at
            padding is not read: it may be NaN.

    Returns:
        An fp32 scalar (fp64 if an argument is fp64).

    Raises:
        UsageError: if shapes do not fit.
    """
    check_arguments(y, expected, mask)
    error = widened(y) - widened(expected.detach())
    if mask is not None:
        valid = (mask != 0).reshape(*mask.shape, *(1 for _ in y.shape[2:]))
        error = torch.where(valid, error, 0.0)
    return error.square().sum()


def check_arguments(y: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Check what `attention_mse` was given.

    Raises:
        UsageError: if shapes do not fit.
    """
    if y.ndim < 2 or y.shape != expected.shape:
        raise UsageError(
            f"y {list(y.shape)} and expected {list(expected.shape)} given; allowed: one shape, "
            "[B, T, ...]"
        )
    if mask is not None and mask.shape != y.shape[:2]:
        raise UsageError(
            f"mask {list(mask.shape)} given; allowed for y {list(y.shape)}: {list(y.shape[:2])}"
        )
