"""Depthwise convolution over time as shifted multiply-adds, with a backward by hand.

In eager mode on a CPU about twice as fast as `conv1d`, forward and backward, and time stays the
second axis. For y[t, c] = sum_j w[c, j] x[t + j, c]:

    dx[s, c] = sum_j w[c, j] dy[s - j, c]            dw[c, j] = sum_t dy[t, c] x[t + j, c]
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["shifted_sum"]


def shifted_sum(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every window of K steps weighted by the taps.

    Args:
        x: `[B, T + K - 1, C]`.
        weight: taps `[C, K]`.

    Returns:
        `[B, T, C]`, in the wider of the two dtypes.
    """
    wide = torch.promote_types(x.dtype, weight.dtype)
    arguments = (x.to(wide), weight.to(wide))
    y: torch.Tensor = _ShiftedSum.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


class _ShiftedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        taps = weight.mT.contiguous()
        time = x.shape[1] - len(taps) + 1
        y = x[:, :time] * taps[0]
        for j in range(1, len(taps)):
            y.addcmul_(x[:, j : j + time], taps[j])
        ctx.save_for_backward(x, taps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, taps = ctx.saved_tensors
        time, dx, dw = dy.shape[1], None, None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x)
            for j in range(len(taps)):
                dx[:, j : j + time].addcmul_(dy, taps[j])
        if ctx.needs_input_grad[1]:
            columns = [(dy * x[:, j : j + time]).sum(dim=(0, 1)) for j in range(len(taps))]
            dw = torch.stack(columns, dim=1)
        return dx, dw
