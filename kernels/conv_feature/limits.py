"""What the Triton form of convolution and feature map can do; needs no Triton itself."""

import torch

__all__ = ["declined"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_FEATURES = 128  # a tile holds all columns of a head
MOST_TAPS = 16


def declined(
    x: torch.Tensor, taps: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor | None
) -> str | None:
    """Why the Triton form cannot take these arguments of `conv_feature`; None: it can."""
    given = (x, taps, weight) if tail is None else (x, taps, weight, tail)
    if any(t.dtype not in DTYPES for t in given):
        names = ", ".join(str(t.dtype).removeprefix("torch.") for t in given)
        return f"tensors of {names} given; allowed: float32, float16, bfloat16"
    features, count = weight.shape[2], taps.shape[1]
    if features > MOST_FEATURES or count > MOST_TAPS:
        allowed = f"up to {MOST_FEATURES} and {MOST_TAPS}"
        return f"f = {features} and K = {count} given; allowed: {allowed}"
    return None
