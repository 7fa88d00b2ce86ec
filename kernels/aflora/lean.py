"""`reference.side_path` that keeps no tensor of the size of its output for the backward pass.

Autograd on the plain form keeps (d u) B^T, `[..., out]`, for the gradient of b, even when both
projections are frozen. From u, `[..., r]`, everything follows; with g the gradient of the output,

    v  = d u,           G  = s g^T v,              dB = b[:, None] G,   db = rowsum(G * B)
    h  = s (b g) B,     dd = colsum(h u),          dA = (d h)^T x,      dx = (d h) A

so x is kept only while A is trained.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from edgekit.kernels.precision import full_precision

__all__ = ["side_path"]


def side_path(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    d_vector: torch.Tensor,
    b_vector: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Arguments and result of the reference; under autocast it computes in autocast's dtype."""
    device = x.device.type
    tensors: tuple[torch.Tensor, ...] = (x, a, b, d_vector, b_vector)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        tensors = tuple(tensor.to(narrow) for tensor in tensors)
    with full_precision(x):
        y: torch.Tensor = _SidePath.apply(*tensors, scale)  # type: ignore[no-untyped-call]
    return y


class _SidePath(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        d_vector: torch.Tensor,
        b_vector: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        u = x @ a.mT
        kept = x if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, u, a, b, d_vector, b_vector)
        ctx.scale = scale
        return ((u * d_vector) @ b.mT).mul_(b_vector * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, u, a, b, d_vector, b_vector = ctx.saved_tensors
        by_x, by_a, by_b, by_d, by_b_vector, _ = ctx.needs_input_grad
        g, u = grad.flatten(0, -2), u.flatten(0, -2)
        grads: list[torch.Tensor | None] = [None] * 6
        if by_b or by_b_vector:
            outer = g.mT @ (u * (d_vector * ctx.scale))
            grads[2] = b_vector[:, None] * outer if by_b else None
            grads[4] = (outer * b).sum(dim=1) if by_b_vector else None
        if by_x or by_a or by_d:
            h = g @ (b * (b_vector * ctx.scale)[:, None])
            grads[3] = (h * u).sum(dim=0) if by_d else None
            h = h * d_vector
            grads[1] = h.mT @ x.flatten(0, -2) if by_a else None
            grads[0] = (h @ a).view(*grad.shape[:-1], a.shape[1]) if by_x else None
        return tuple(grads)
