"""Where a reference must not compute in 16 bits."""

import torch

__all__ = ["widened"]


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or as it is if it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
