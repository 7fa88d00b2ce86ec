"""Stage-1 loss: how far a mixer's output is from the teacher's."""

import torch

from edgekit.kernels.attention_mse import reference
from edgekit.kernels.dispatch import choose

__all__ = ["attention_mse"]

FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention_mse(
    y: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Summed squared difference over valid positions, in the form for `y`'s device.

    Args:
        y: what the student says, `[B, T, ...]`.
        expected: what the teacher says, of the same shape; it gets no gradient.
        mask: 1 for tokens, 0 for padding, `[B, T]`, or None when nothing is padded. What stands at
            padding is not read: it may be NaN.

    Returns:
        An fp32 scalar (fp64 if an argument is fp64), a sum and not a mean.

    Raises:
        UsageError: if shapes do not fit.
        UnsupportedError: if Triton is forced where it cannot run.

    Source: LAWCAT, arXiv 2509.18467; the maths is in this folder's README.

    Example:
        >>> y, expected = torch.ones(2, 3, 8), torch.zeros(2, 3, 8)
        >>> attention_mse(y, expected, torch.tensor([[1, 1, 0], [1, 1, 1]]))
        tensor(40.)
    """
    reference.check_arguments(y, expected, mask)
    fits = y.dtype in FUSED_DTYPES and expected.dtype in FUSED_DTYPES and y.numel() > 0
    if choose("attention_mse", y, fused=fits) != "triton":
        return reference.attention_mse(y, expected, mask)
    from edgekit.kernels.attention_mse import fused  # Triton is optional

    return fused.attention_mse(y, expected, mask)
