"""Normalised gated linear attention by Triton programs, with the reference's signature.

The forward pass keeps q, k, v, g, the output and its denominators; states are made again in the
backward pass. `README.md` has the maths and what moves through memory.
"""

from typing import Any, Literal

import torch
import triton
from torch.autograd.function import once_differentiable

from edgekit.errors import UsageError
from edgekit.kernels.gla.plan import (
    CHUNK,
    FEWEST,
    SETTINGS,
    SMALL_CHUNK,
    WIDEST,
    Plan,
    block_of,
    blocks_of,
    program_of,
)
from edgekit.kernels.gla.programs_backward import backward_rows
from edgekit.kernels.gla.reference import Output, check_arguments
from edgekit.kernels.offline import WARP_GROUP_ROWS, Build
from edgekit.kernels.precision import FUSED_MULTIPLY_ADD
from edgekit.kernels.sequences import chunk_table, sequence_offsets

__all__ = ["Passes", "builds", "fused_gla"]

Passes = Literal["auto", "one", "two"]
Gradients = tuple[torch.Tensor | None, ...]
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
        chunk: tokens of a chunk: 16, 32 or 64.
        passes: `one` keeps the state on the chip while it makes the outputs, which needs as many
            sequences and heads as the GPU has multiprocessors; `two` makes the states first.

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
    offsets = sequence_offsets(q, cu_seqlens)
    if state is None:
        state = q.new_zeros(0)
    if plan.time <= FEWEST and not _needs_gradients(q, k, v, g, state):
        return _steps(plan, q, k, v, g, state, offsets)
    one = passes == "one" or (passes == "auto" and _fills_the_chip(plan, len(offsets) - 1, q))
    arguments = (q, k, v, g, state, offsets, plan, one, cu_seqlens is not None)
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
        offsets: torch.Tensor,
        plan: Plan,
        one: bool,
        packed: bool,
    ) -> Output:
        q, k, v, g, state = (x.contiguous() for x in (q, k, v, g, state))
        first, owner = chunk_table(offsets, q.shape[0] * plan.time, plan.chunk, packed=packed)
        output, den, after = _empty_results(plan, q, k, v, offsets)
        count, eps = len(offsets) - 1, plan.eps or 0.0
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
        de = _by_denominators(plan, output, by_output, den)
        dh, dz = torch.empty_like(h), torch.empty_like(z)
        carry, by_state = torch.empty_like(z), torch.empty_like(by_after)
        states = (h, z, after, by_after, dh, dz, carry, by_state)
        arguments = (q, g, by_output, den, de, *states, offsets, first)
        plan.launch("backward_states", (count * plan.states,), *arguments)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        shares = plan.gate_shares
        dg = g.new_empty((shares, *g.shape), dtype=torch.float32 if shares > 1 else g.dtype)
        read, table = (q, k, v, g, by_output, den, de), (offsets, first, owner, count)
        plan.launch("backward_queries", (len(owner), plan.heads), *read, h, z, dq, *table)
        by_values = ctx.needs_input_grad[2]  # frozen in the first stage of distillation
        together = by_values and plan.values_with_keys
        by_keys = (*read, dh, dz, carry, dq, dk, dv, dg, *table)
        grid = (len(owner), plan.states)
        plan.launch("backward_keys", grid, *by_keys, with_values=together)
        if by_values and not together:
            plan.launch("backward_values", grid, q, k, g, by_output, den, dh, dv, *table)
        state_too = by_state if plan.given else None
        dg = (dg.sum(0) if shares > 1 else dg[0]).to(g.dtype)
        return (dq, dk, dv if by_values else None, dg, state_too, None, None, None, None)


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
    plan: Plan, output: torch.Tensor, by_output: torch.Tensor, den: torch.Tensor
) -> torch.Tensor:
    """Gradients of the denominators, fp32 `[tokens, H]`."""
    de = torch.empty_like(den)
    if plan.eps is not None:
        sizes = {"V": plan.values, "BV": block_of(plan.values), "ROWS": ROWS}
        grid = (triton.cdiv(den.numel(), ROWS),)
        backward_rows[grid](output, by_output, den, de, den.numel(), **sizes, **FUSED_MULTIPLY_ADD)
    return de


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
    widest = max(q.shape[3], v.shape[3])
    if widest > WIDEST:
        raise UsageError(f"{widest} features or values given; allowed: {WIDEST} at most")
    if chunk not in (16, 32, 64):
        raise UsageError(f"chunk {chunk} given; allowed: 16, 32 or 64")


def _needs_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _fills_the_chip(plan: Plan, sequences: int, q: torch.Tensor) -> bool:
    """Whether one program for each sequence and head leaves few multiprocessors idle."""
    if not q.is_cuda:
        return False
    blocks = blocks_of(plan.values, plan.setting("forward_whole").values)
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count
    return bool(sequences * plan.states * blocks >= 0.75 * cores)


def builds() -> tuple[Build, ...]:
    """What is shipped: bf16, 64 or 128 wide; gates per feature in fp32 or bf16, or per head."""
    return tuple(
        _build(_shipped_plan(width, gates or width, chunk), program, dtype, architectures)
        for chunk, architectures in ((SMALL_CHUNK, (80,)), (CHUNK, (90, 100)))
        for width in SETTINGS
        for gates, dtype in ((None, "fp32"), (None, "bf16"), (1, "bf16"))
        for program in SETTINGS[width]
        if not (program == "backward_values" and width <= 64)
    )


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
    wide = {"z", "dz", "carry", "den", "de", "state", "after", "by_after", "by_state"}
    whole = {"offsets", "first", "owner"}
    constants = plan.constants(program, with_values=plan.values_with_keys)
    types = {"eps": "fp32", "sequences": "i32", "g": f"*{gates}"}
    names = program_of(program).arg_names
    types |= {"dg": "*fp32" if plan.gate_shares > 1 else types["g"]}
    types = {name: kind for name, kind in types.items() if name in names}
    for name in names:
        if name not in constants and name not in types:
            types[name] = "*fp32" if name in wide else "*i32" if name in whole else "*bf16"
    setting = plan.setting(program)
    return Build(
        name=f"gla {program}, width {plan.features}, {plan.gates} gates {gates}",
        program=program_of(program),
        types=types,
        constants=constants,
        warps=setting.warps,
        stages=setting.stages,
        architectures=architectures,
        tensor_cores=program != "forward_steps",
        warp_groups=not program.endswith("_states") or setting.features >= WARP_GROUP_ROWS,
    )
