"""Attention with image mass by Triton programs, with the reference's signature; inference only.

`README.md` has the maths and what moves through memory.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from edgekit.errors import UsageError
from edgekit.kernels.dispatch import interpreted
from edgekit.kernels.launch import SMALLEST_SIDE, block_of, launch
from edgekit.kernels.offline import WARP_GROUP_ROWS, Build
from edgekit.kernels.spin_attention import programs
from edgekit.kernels.spin_attention.limits import WIDEST, declined

__all__ = ["builds", "spin_attention"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setting:
    """Rows and keys at a time (a word of flags holds 64), warps, and stages of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# By the bytes of an element and the width of a head that they are for at most.
SETTINGS = {
    (2, 64): _Setting(rows=128, keys=64, warps=8, stages=3),
    (2, 128): _Setting(rows=64, keys=32, warps=8, stages=2),
    (2, 256): _Setting(rows=64, keys=16, warps=8, stages=2),
    (4, 64): _Setting(rows=32, keys=32, warps=4, stages=2),
    (4, 128): _Setting(rows=32, keys=16, warps=8, stages=2),
    (4, 256): _Setting(rows=32, keys=16, warps=8, stages=1),
}
# The same where there are no more than SMALLEST_SIDE rows: one token of a text that goes on.
STEPS = {
    (2, 64): _Setting(rows=16, keys=64, warps=4, stages=3),
    (2, 128): _Setting(rows=16, keys=64, warps=4, stages=3),
    (2, 256): _Setting(rows=16, keys=32, warps=4, stages=3),
    (4, 64): _Setting(rows=16, keys=64, warps=8, stages=2),
    (4, 128): _Setting(rows=16, keys=32, warps=4, stages=2),
    (4, 256): _Setting(rows=16, keys=16, warps=8, stages=1),
}
SHIPPED = tuple(product((("bf16", 2), ("fp32", 4)), (64, 128, 256)))  # dtypes, widths
PACKED = 16  # words that a program of `pack` writes
MOST_PARTS = 64  # of the keys, where rows alone do not fill the chip
SHORTEST_PART = 4  # blocks of keys, below which putting parts together costs more


def spin_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    image: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    past: int = 0,
    window: int | None = None,
    parts: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference, without gradients.

    Views that only order axes otherwise, as a cache `[B, G, S, D]` does, are read in place.

    Args:
        q: `[B, T, H, D]`, D at most 256, 16 or 32 bits wide; products are in its dtype.
        k: `[B, S, G, D]`.
        v: `[B, S, G, D]`.
        image: bool `[B, S]`.
        mask: bool or 0 and 1, `[B, S]`; None: no padding.
        scale: of the logits, above 0; None: D^-1/2.
        past: S - T.
        window: keys that a query sees at most; None: all.
        parts: of the keys, each read by programs of its own; None: as many as the chip has room.

    Raises:
        UsageError: for another dtype or width, or where a gradient is asked for.
    """
    reason = declined(q, k, v)
    if reason is not None:
        raise UsageError(f"the Triton form of spin_attention: {reason}. Use the form `torch`")
    q, k, v = (_in_place(x.to(q.dtype)) for x in (q, k, v))
    plan = _Plan.of(q, k, mask is not None, window)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if parts is None:
        parts = _parts(plan, q, k.shape[1])
    return _attended(plan, q, k, v, _packed(image, mask), scale, past, window or 0, parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What a call's programs are compiled for."""

    groups: int
    heads: int
    width: int
    padded: bool
    sliding: bool
    setting: _Setting
    operand: Any

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, padded: bool, window: int | None) -> "_Plan":
        _, time, heads, width = q.shape
        groups = k.shape[2]
        step = time * heads // groups <= SMALLEST_SIDE
        table, limit = (STEPS if step else SETTINGS), 64 if width <= 64 else 128
        # The interpreter does not know bf16.
        narrow = q.element_size() == 2 and not interpreted()
        return cls(
            groups=groups,
            heads=heads,
            width=width,
            padded=padded,
            sliding=window is not None,
            setting=table[q.element_size(), limit if width <= 128 else WIDEST],
            operand=_OPERANDS[q.dtype] if narrow else tl.float32,
        )

    def constants(self, parts: int) -> dict[str, Any]:
        """Compile-time arguments of `attend`."""
        return {
            "G": self.groups,
            "R": self.heads // self.groups,
            "D": self.width,
            "BD": block_of(self.width),
            "BM": self.setting.rows,
            "BN": self.setting.keys,
            "WINDOW": self.sliding,
            "PADDED": self.padded,
            "PARTS": parts > 1,
            "OP": self.operand,
        }


_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _attended(
    plan: _Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    words: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    past: int,
    window: int,
    parts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, time, heads, width = q.shape
    total_keys, setting = k.shape[1], plan.setting
    output, mass = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    if not mass.numel():
        return output, mass
    pieces, masses, total = output, mass, mass
    if parts > 1:
        pieces = mass.new_empty((parts, *q.shape))
        masses, total = mass.new_empty((2, parts, *mass.shape)).unbind()
    part = triton.cdiv(triton.cdiv(total_keys, setting.keys), parts)
    grid = (triton.cdiv(time * heads // plan.groups, setting.rows), batch * plan.groups, parts)
    launch(
        programs.attend,
        grid,
        *(q, k, v, *words, pieces, masses, total, scale),
        *(time, total_keys, past, window, part),
        *_strides(q, k, v),
        **plan.constants(parts),
        num_warps=setting.warps,
        num_stages=setting.stages,
    )
    if parts > 1:
        sizes = {"D": width, "BD": block_of(width), "BP": triton.next_power_of_2(parts)}
        rows = mass.numel()
        arguments = (pieces, masses, total, output, mass, rows, parts)
        launch(programs.merge, (rows,), *arguments, **sizes)
    return output, mass


def _in_place(x: torch.Tensor) -> torch.Tensor:
    """`x [B, T, H, D]` itself if its strides count rows of D elements, otherwise a copy."""
    rows = x.stride(3) == 1 and all(stride % x.shape[3] == 0 for stride in x.stride()[:3])
    return x if rows else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Between batches, tokens and heads of each, in rows."""
    return [stride // x.shape[3] for x in tensors for stride in x.stride()[:3]]


def _packed(image: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys belong to an image, and which are tokens, as bits: int64 `[B, words]` each.

    Args:
        image: flags `[B, S]`.
        mask: the same; None: all are tokens, and nobody reads the second result.
    """
    batch, keys = image.shape
    flags, *left = (x.bool().contiguous().view(torch.uint8) for x in (image, mask) if x is not None)
    words = triton.cdiv(keys, programs.WORD.value)
    bits = torch.empty((1 + len(left), batch, words), dtype=torch.int64, device=image.device)
    grid = (triton.cdiv(words, PACKED), batch)
    arguments = (flags, (*left, flags)[0], bits[0], bits[-1], keys)
    launch(programs.pack, grid, *arguments, PADDED=bool(left), ROWS=PACKED)
    return bits[0], bits[-1]


def _parts(plan: _Plan, q: torch.Tensor, keys: int) -> int:
    """How many programs share a row's keys, so that there are two for each multiprocessor."""
    if not q.is_cuda:
        return 1
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count
    rows = triton.cdiv(q.shape[1] * plan.heads // plan.groups, plan.setting.rows)
    room = 2 * cores // (rows * q.shape[0] * plan.groups)
    longest = triton.cdiv(keys, plan.setting.keys * SHORTEST_PART)
    return int(max(1, min(room, longest, MOST_PARTS)))


def builds() -> tuple[Build, ...]:
    """What is shipped: prompts and single tokens, heads of 64, 128 and 256, in bf16 and fp32."""
    found = []
    for table, ((dtype, itemsize), width) in product((SETTINGS, STEPS), SHIPPED):
        for limited in (False, True) if dtype == "bf16" and width <= 128 else (True,):
            plan = _Plan(
                groups=4,
                heads=12,
                width=width,
                padded=limited,
                sliding=limited,
                setting=table[itemsize, width],
                operand=tl.bfloat16 if itemsize == 2 else tl.float32,
            )
            found.append(_build(plan, dtype, parts=8 if table is STEPS else 1))
    return (*found, _merge_build(), _pack_build())


def _build(plan: _Plan, dtype: str, parts: int) -> Build:
    types = dict.fromkeys(("q", "k", "v"), f"*{dtype}")
    types |= {"image": "*i64", "tokens": "*i64", "mass": "*fp32", "total": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(programs.CHANGING, "i32")
    kind = "tokens" if plan.setting.rows > SMALLEST_SIDE else "one token"
    limits = ", padding and window" if plan.padded else ""
    return Build(
        name=f"spin_attention {kind}, width {plan.width} {dtype}{limits}",
        program=programs.attend,
        types={**types, "o": "*fp32" if parts > 1 else f"*{dtype}"},
        constants=plan.constants(parts),
        warps=plan.setting.warps,
        stages=plan.setting.stages,
        tensor_cores=dtype == "bf16",
        warp_groups=plan.setting.rows >= WARP_GROUP_ROWS,
    )


def _merge_build() -> Build:
    types = dict.fromkeys(("o_parts", "mass_parts", "total", "mass"), "*fp32")
    return Build(
        name="spin_attention merge, width 128 bf16",
        program=programs.merge,
        types={**types, "o": "*bf16", "rows": "i32", "parts": "i32"},
        constants={"D": 128, "BD": 128, "BP": MOST_PARTS},
        tensor_cores=False,
    )


def _pack_build() -> Build:
    return Build(
        name="spin_attention pack",
        program=programs.pack,
        types={"flags": "*u8", "mask": "*u8", "image": "*i64", "tokens": "*i64", "keys": "i32"},
        constants={"PADDED": True, "ROWS": PACKED},
        tensor_cores=False,
    )
