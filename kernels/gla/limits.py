"""What the Triton form of gated linear attention takes."""

import torch

__all__ = ["WIDEST", "declined"]

WIDEST = 128  # a tile holds all features, or all values, of a head


def declined(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the Triton form does not take these arguments; None if it does."""
    if q.dtype == torch.float64:
        return "fp64 given; allowed: 16 or 32 bits"
    widest = max(q.shape[3], v.shape[3])
    if widest > WIDEST:
        return f"{widest} features or values given; allowed: {WIDEST} at most"
    return None
