"""Host side of the Triton form of the stage-1 loss; the plan is in `programs`."""

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from edgekit.errors import UsageError
from edgekit.kernels.attention_mse import programs
from edgekit.kernels.attention_mse.reference import check_arguments
from edgekit.kernels.launch import launch
from edgekit.kernels.offline import Build

__all__ = ["attention_mse", "builds"]

# Positions and values of a tile: whatever the widths, they are read once, so one size serves all.
TILE = {"BR": 16, "BW": 256}
WARPS = 4


def attention_mse(
    y: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Summed squared difference over valid positions, in one pass.

    Arguments, result and errors are those of `reference.attention_mse`. Besides, no argument may be
    fp64 or empty. The sum is fp32 and the same on every run.
    """
    check_arguments(y, expected, mask)
    if torch.float64 in (y.dtype, expected.dtype) or not y.numel():
        given = f"y {list(y.shape)} {y.dtype} and expected {expected.dtype}"
        raise UsageError(
            f"the Triton form of attention_mse: {given} given; allowed: values in float32, float16 "
            "or bfloat16. Use the form `torch`"
        )
    valid = None if mask is None else (mask != 0).to(torch.int8)
    arguments = (y.contiguous(), expected.detach().contiguous(), valid)
    loss: torch.Tensor = _AttentionMse.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def builds() -> tuple[Build, ...]:
    """The programs as they are launched for 9 heads of 64 and 16 of 128."""
    read = {"p_y": "*bf16", "p_expected": "*bf16", "p_mask": "*i8", "rows": "i32"}
    sides = {
        programs.forward: {"p_sums": "*fp32"},
        programs.backward: {"p_upstream": "*fp32", "p_dy": "*bf16"},
    }
    return tuple(
        Build(
            name=f"attention_mse {program.__name__} {width} values",
            program=program,
            types=read | own,
            constants={"W": width, **TILE},
            warps=WARPS,
            tensor_cores=False,
        )
        for width in (9 * 64, 16 * 128)
        for program, own in sides.items()
    )


class _AttentionMse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, expected: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(y, expected, valid)
        rows, width = _sizes(y)
        sums = y.new_empty(triton.cdiv(rows, TILE["BR"]), dtype=torch.float32)
        arguments = (y, expected, valid, sums, rows)
        launch(programs.forward, (len(sums),), *arguments, W=width, **TILE, num_warps=WARPS)
        return sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        y, expected, valid = ctx.saved_tensors
        rows, width = _sizes(y)
        dy = torch.empty_like(y)
        grid = (triton.cdiv(rows, TILE["BR"]), triton.cdiv(width, TILE["BW"]))
        arguments = (y, expected, valid, upstream, dy, rows)
        launch(programs.backward, grid, *arguments, W=width, **TILE, num_warps=WARPS)
        return dy, None, None


def _sizes(y: torch.Tensor) -> tuple[int, int]:
    """Positions, and values of each."""
    rows = y.shape[0] * y.shape[1]
    return rows, y.numel() // rows
