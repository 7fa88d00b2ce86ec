"""AFLoRA's side path, written as in the paper (arXiv 2403.13269).

    u = x A^T,   y = s b * ((d * u) B^T)

`T` is any number of leading dimensions, r the rank.
"""

import torch
from torch.nn import functional

__all__ = ["side_path"]


def side_path(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    d_vector: torch.Tensor,
    b_vector: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What the adapter adds to a linear map's output.

    Args:
        x: inputs `[..., in]`.
        a: the projection down, `[r, in]`.
        b: the projection up, `[out, r]`.
        d_vector: scales after `a`, `[r]`.
        b_vector: scales after `b`, `[out]`.
        scale: s.

    Returns:
        `[..., out]`, in the dtype of the inputs.
    """
    u = functional.linear(x, a)
    return functional.linear(u * d_vector, b) * (b_vector * scale)
