"""How a Triton program is started, and the blocks that it works in."""

from typing import Any

import torch
import triton

__all__ = ["FUSED_MULTIPLY_ADD", "SMALLEST_SIDE", "block_of", "launch"]

# Stated at every launch: Triton 3.10 is to change what it does where nothing is said.
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}
SMALLEST_SIDE = 16  # of a matrix product


def launch(program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `program` on the device of its first tensor, whichever device is the current one.

    Args:
        program: what `triton.jit` returned.
        grid: programs along each axis; nothing runs if one is 0.
        arguments: that are not compile-time constants.
        constants: the others, and `num_warps` and `num_stages`.
    """
    if 0 in grid:
        return
    first = next(x for x in arguments if isinstance(x, torch.Tensor))
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        program[grid](*arguments, **constants, **FUSED_MULTIPLY_ADD)


def block_of(width: int) -> int:
    """The smallest side of a matrix product that holds `width`."""
    return max(SMALLEST_SIDE, int(triton.next_power_of_2(width)))
