"""Normalised gated linear attention by Triton programs, with the reference's signature.

The forward pass keeps q, k, v, g, the output and its denominators; states are made again in the
backward pass. `README.md` has the maths and what moves through memory.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
import triton
from torch.autograd.function import once_differentiable

from edgekit.errors import UsageError
from edgekit.kernels.gla.limits import WIDEST, declined
from edgekit.kernels.gla.plan import (
    CHUNK,
    EXACT_CHUNK,
    SMALL_CHUNK,
    Plan,
    blocks_of,
    program_of,
    settings_of,
)
from edgekit.kernels.gla.programs_backward import backward_rows
from edgekit.kernels.gla.reference import Output, check_arguments
from edgekit.kernels.launch import block_of, launch
from edgekit.kernels.offline import ARCHITECTURES, WARP_GROUP_ROWS, Build
from edgekit.kernels.sequences import Sequences

__all__ = ["Passes", "builds", "fused_gla"]

Passes = Literal["auto", "one", "two"]
Gradients = tuple[torch.Tensor | None, ...]
FEW = 16  # tokens, that are read one after another where no gradient is wanted
ROWS = 64  # of one program of `backward_rows`


def fused_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    normalise: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    chunk: int | None = None,
    passes: Passes = "auto",
) -> Output:
    """Arguments and results of `reference.recurrent_gla`; gates below -2.5 count as -2.5.

    Args:
        q: `[B, T, H, F]`.
        k: `[B, T, S, F]`.
        v: `[B, T, S, V]`.
        g: `[B, T, S, F]` or `[B, T, S, 1]`.
        state: fp32 `[N, S, F, V + 1]` or None.
        eps: added to the denominator.
        normalise: divide by the denominator; False scales by F^-1/2.
        cu_seqlens: `[N + 1]`, of packed sequences in a batch of 1.
        chunk: tokens of a chunk: 16, 32 or 64; a GPU takes 16 where it multiplies fp32.
        passes: `one` keeps the state on the chip while it makes the outputs, which needs as many
            sequences and heads as the GPU has multiprocessors, and registers, which fp32 and wide
            groups lack; `two` makes the states first.

    Returns:
        The output in the wider dtype of q, k and v (16-bit inputs are multiplied as bf16, others
        as torch's `float32_matmul_precision` says), and the state in fp32.

    Raises:
        UsageError: for sizes above 128, a chunk that is not offered, or offsets that do not fit.
    """
    chunk = _chunk_for(q) if chunk is None else chunk
    check_arguments(q, k, v, g, state, cu_seqlens)
    _check(q, v, chunk)
    given = state is not None
    plan = Plan.of(q, k, v, g, chunk, eps if normalise else None, given)
    sequences = Sequences.of(q, cu_seqlens)
    if state is None:
        state = q.new_zeros(0)
    if plan.time <= FEW and not _needs_gradients(q, k, v, g, state):
        return _steps(plan, q, k, v, g, state, sequences.offsets)
    one = passes == "one" or (passes == "auto" and _fills_the_chip(plan, len(sequences), q))
    arguments = (q, k, v, g, state, sequences, plan, one)
    output, after = _FusedGla.apply(*arguments)  # type: ignore[no-untyped-call]
    return output, after


class _FusedGla(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        state: torch.Tensor,
        sequences: Sequences,
        plan: Plan,
        one: bool,
    ) -> Output:
        q, k, v, g, state = (x.contiguous() for x in (q, k, v, g, state))
        offsets, (first, owner) = sequences.offsets, sequences.chunks(plan.chunk)
        output, den, after = _empty_results(plan, q, k, v, offsets)
        count, eps = len(sequences), plan.eps or 0.0
        if one:
            heads = (count * plan.states,)
            plan.launch("forward_whole", heads, q, k, v, g, state, output, den, after, offsets, eps)
        else:
            h, z = _states(plan, k, v, g, state, after, offsets, first, owner)
            grid = (len(owner), plan.heads)
            arguments = (q, k, v, g, h, z, output, den, offsets, first, owner, count, eps)
            plan.launch("forward_outputs", grid, *arguments)
        ctx.save_for_backward(q, k, v, g, state, output, den, offsets, first, owner)
        ctx.plan = plan
        return output, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: torch.Tensor, by_after: torch.Tensor) -> Gradients:
        q, k, v, g, state, output, den, offsets, first, owner = ctx.saved_tensors
        plan: Plan = ctx.plan
        by_output, by_after = by_output.contiguous(), by_after.contiguous()
        count = len(offsets) - 1
        after = torch.empty_like(by_after)
        h, z = _states(plan, k, v, g, state, after, offsets, first, owner)
        de, top = _by_denominators(plan, output, by_output, den, by_after)
        dh, dz = torch.empty_like(h), torch.empty_like(z)
        carry, by_state = torch.empty_like(z), torch.empty_like(by_after)
        states = (h, z, after, by_after, dh, dz, carry, by_state)
        arguments = (q, g, by_output, den, de, top, *states, offsets, first)
        plan.launch("backward_states", (count * plan.states,), *arguments)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        shares = plan.gate_shares
        dg = g.new_empty((shares, *g.shape), dtype=torch.float32 if shares > 1 else g.dtype)
        read, table = (q, k, v, g, by_output, den, de, top), (offsets, first, owner, count)
        plan.launch("backward_queries", (len(owner), plan.heads), *read, h, z, dq, *table)
        by_values = ctx.needs_input_grad[2]  # frozen in the first stage of distillation
        together = by_values and plan.values_with_keys
        by_keys = (*read, dh, dz, carry, dq, dk, dv, dg, *table)
        grid = (len(owner), plan.states)
        plan.launch("backward_keys", grid, *by_keys, with_values=together)
        if by_values and not together:
            plan.launch("backward_values", grid, q, k, g, by_output, den, de, top, dh, dv, *table)
        state_too = by_state if plan.given else None
        dg = (dg.sum(0) if shares > 1 else dg[0]).to(g.dtype)
        return (dq, dk, dv if by_values else None, dg, state_too, None, None, None)


def _states(
    plan: Plan,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    after: torch.Tensor,
    offsets: torch.Tensor,
    first: torch.Tensor,
    owner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """States entering every chunk: values' `[chunks, S, F, V]`, keys' `[chunks, S, F]`."""
    shape = (len(owner), plan.states, plan.features)
    h = torch.empty((*shape, plan.values), dtype=plan.operand, device=k.device)
    z = torch.empty(shape, dtype=torch.float32, device=k.device)
    grid = ((len(offsets) - 1) * plan.states,)
    plan.launch("forward_states", grid, k, v, g, state, h, z, after, offsets, first)
    return h, z


def _by_denominators(
    plan: Plan,
    output: torch.Tensor,
    by_output: torch.Tensor,
    den: torch.Tensor,
    by_after: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the denominators, fp32 `[tokens, H]`; the largest of any numerator's, `[1]`.

    Where the loss saw no output, the second is the largest of the last states'.
    """
    de, top = torch.empty_like(den), den.new_zeros(1)
    sizes = {"V": plan.values, "BV": block_of(plan.values), "ROWS": ROWS}
    grid = (triton.cdiv(den.numel(), ROWS),)
    arguments = (output, by_output, den, de, top, den.numel())
    launch(backward_rows, grid, *arguments, **sizes, NORMALISE=plan.eps is not None)
    return de, torch.where(top > 0, top, by_after.abs().amax())


def _steps(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    offsets: torch.Tensor,
) -> Output:
    q, k, v, g, state = (x.detach().contiguous() for x in (q, k, v, g, state))
    output, _, after = _empty_results(plan, q, k, v, offsets)
    grid = ((len(offsets) - 1) * plan.states,)
    arguments = (q, k, v, g, state, output, after, offsets, plan.eps or 0.0)
    plan.launch("forward_steps", grid, *arguments)
    return output, after


def _empty_results(
    plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the output, its denominators and the last states go."""
    batch, time, heads, _ = q.shape
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    output = torch.empty((batch, time, heads, plan.values), dtype=wide, device=q.device)
    den = torch.empty((batch * time, heads), dtype=torch.float32, device=q.device)
    shape = (len(offsets) - 1, plan.states, plan.features, plan.values + 1)
    return output, den, torch.empty(shape, dtype=torch.float32, device=q.device)


def _chunk_for(q: torch.Tensor) -> int:
    early = q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0)
    return SMALL_CHUNK if early else CHUNK


def _check(q: torch.Tensor, v: torch.Tensor, chunk: int) -> None:
    reason = declined(q, v)
    if reason is not None:
        raise UsageError(f"the Triton form of gla: {reason}. Use the form `torch`")
    if chunk not in (16, 32, 64):
        raise UsageError(f"chunk {chunk} given; allowed: 16, 32 or 64")


def _needs_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _fills_the_chip(plan: Plan, sequences: int, q: torch.Tensor) -> bool:
    """Whether one program for each sequence and head leaves few multiprocessors idle."""
    if not q.is_cuda or not plan.in_one_pass:
        return False
    blocks = blocks_of(plan.values, plan.setting("forward_whole").values)
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count
    return bool(sequences * plan.states * blocks >= 0.75 * cores)


def builds() -> tuple[Build, ...]:
    """What is shipped: bf16, 64 or 128 wide; gates per feature in fp32 or bf16, or per head.

    And 64 and 128 wide in fp32, and with three query heads for each state.
    """
    kinds = ((None, "fp32"), (None, "bf16"), (1, "bf16"))
    plans: list[tuple[Plan, str, tuple[int, ...]]] = [
        (_shipped_plan(width, gates or width, chunk), kind, architectures)
        for chunk, architectures in ((SMALL_CHUNK, (80,)), (CHUNK, (90, 100)))
        for width in (64, WIDEST)
        for gates, kind in kinds
    ]
    for width in (64, WIDEST):
        plan = _shipped_plan(width, width, CHUNK)
        exact = replace(plan, operand=torch.float32, chunk=EXACT_CHUNK)
        grouped = replace(plan, heads=3 * plan.states)
        plans += [(exact, "fp32", ARCHITECTURES), (grouped, "fp32", (90,))]
    return tuple(
        _build(plan, program, kind, architectures)
        for plan, kind, architectures in plans
        for program in settings_of(64 if plan.features <= 64 else WIDEST, plan.operand)
        if not (program == "backward_values" and plan.values_with_keys)
        if not (program == "forward_whole" and not plan.in_one_pass)
    ) + tuple(_rows_build(width) for width in (64, WIDEST))


def _shipped_plan(width: int, gates: int, chunk: int) -> Plan:
    return Plan(
        time=4096,
        heads=16,
        states=16,
        features=width,
        values=width,
        gates=gates,
        chunk=chunk,
        eps=1e-6,
        given=True,
        operand=torch.bfloat16,
        precision="ieee",
    )


def _build(plan: Plan, program: str, gates: str, architectures: tuple[int, ...]) -> Build:
    narrow = plan.operand == torch.bfloat16
    wide = {"z", "dz", "carry", "den", "de", "top", "state", "after", "by_after", "by_state"}
    whole = {"offsets", "first", "owner"}
    constants = plan.constants(program, with_values=plan.values_with_keys)
    types = {"eps": "fp32", "sequences": "i32", "g": f"*{gates}"}
    names = program_of(program).arg_names
    types |= {"dg": "*fp32" if plan.gate_shares > 1 else types["g"]}
    types = {name: kind for name, kind in types.items() if name in names}
    for name in names:
        if name not in constants and name not in types:
            others = "*bf16" if narrow else "*fp32"
            types[name] = "*fp32" if name in wide else "*i32" if name in whole else others
    setting = plan.setting(program)
    kind = f"{plan.features}{'' if narrow else ' fp32'}, {plan.gates} gates {gates}"
    groups = plan.heads // plan.states
    return Build(
        name=f"gla {program}, width {kind}{f', {groups} heads a state' if groups > 1 else ''}",
        program=program_of(program),
        types=types,
        constants=constants,
        warps=setting.warps,
        stages=setting.stages,
        architectures=architectures,
        tensor_cores=narrow and program != "forward_steps",
        warp_groups=not program.endswith("_states") or setting.features >= WARP_GROUP_ROWS,
    )


def _rows_build(width: int) -> Build:
    types = {"o": "*bf16", "do": "*bf16", **dict.fromkeys(("den", "de", "top"), "*fp32")}
    return Build(
        name=f"gla backward_rows, width {width}",
        program=backward_rows,
        types={**types, "rows": "i32"},
        constants={"V": width, "BV": width, "ROWS": ROWS, "NORMALISE": True},
        tensor_cores=False,
    )
