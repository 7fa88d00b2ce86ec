"""What the Triton form of attention with image mass takes."""

import torch

__all__ = ["DTYPES", "WIDEST", "declined"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256  # a tile holds all columns of a head


def declined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the Triton form does not take these arguments; None if it does."""
    if q.dtype not in DTYPES or q.shape[3] > WIDEST:
        allowed = f"{', '.join(map(str, DTYPES))}, {WIDEST} wide at most"
        return f"{q.dtype} heads of {q.shape[3]} given; allowed: {allowed}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "a gradient is asked for; allowed: calls under torch.no_grad()"
    return None
