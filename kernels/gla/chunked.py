"""`chunked_gla` of `kernels/gla/reference.py` with every chunk at once and a backward by hand.

The form to train with. Only the states pass from chunk to chunk in a loop; everything else is one
batched product over all chunks, and the backward needs neither the pairwise weights nor the
intermediate values that autograd would keep. For b the cumulative log decay in a chunk, m its
middle row and l its last, q' = q e^(b - m), k' = k e^(m - b), v+ = [v, 1]:

    P = tril(q' k'^T)                  n = P v+ + q' (e^m S)         S' = e^l S + e^(l - m) k'^T v+

and with dn the gradient of n, dS' that of the state leaving the chunk:

    dP  = tril(dn v+^T)                              dS  = e^l dS' + e^m q'^T dn
    dq' = dP k' + dn (e^m S)^T                       dq  = dq' e^(b - m)
    dk' = dP^T q' + v+ (e^(l - m) dS')^T             dk  = dk' e^(m - b)
    dv+ = P^T dn + k' (e^(l - m) dS')
    dg  = reverse cumulative sum of (q' dq' - k' dk') in the chunk + sum over columns of S' dS'

Shapes inside: B batch, S state heads, N chunks, G query heads per state head, C tokens, F features,
V values and the normaliser: queries `[B, S, N, G C, F]`, keys `[B, S, N, C, F]`, states
`[B, S, N, F, V]`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgekit.kernels.gla.reference import Output, over_sequences
from edgekit.kernels.precision import full_precision, widened

__all__ = ["chunked_gla"]

CHUNK = 64


def chunked_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    normalise: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> Output:
    """The same function as `reference.chunked_gla`, in fp32 (fp64 for fp64) whatever comes in."""
    if cu_seqlens is not None:
        return over_sequences(
            chunked_gla, q, k, v, g, state, cu_seqlens, eps, normalise, chunk=chunk
        )
    q, k, v, g = (widened(x) for x in (q, k, v, g))
    g = g.expand(k.shape)
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3] + 1)
    length = min(chunk, q.shape[1])
    with full_precision(q):
        arguments = (q, k, v, g, state, eps if normalise else None, length)
        output, after = _ChunkedGla.apply(*arguments)  # type: ignore[no-untyped-call]
    return output, after


class _ChunkedGla(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        state: torch.Tensor,
        eps: float | None,
        chunk: int,
    ) -> Output:
        states = k.shape[2]
        b = _cumulative(_chunks(g, states, chunk).squeeze(3))
        middle, last = b[..., chunk // 2, None, :], b[..., -1:, :]
        grow = (b - middle).exp_()
        q_rows = _chunks(q, states, chunk).mul_(grow[:, :, :, None]).flatten(3, 4)
        keys = _chunks(k, states, chunk).squeeze(3).div_(grow)
        values = _chunks(functional.pad(v, (0, 1), value=1.0), states, chunk).squeeze(3)
        to_middle, from_middle = middle.exp().mT, (last - middle).exp_().mT
        added = (keys.mT @ values).mul_(from_middle)
        entering = _scan(to_middle * from_middle, added, state)
        numerator = _weights(q_rows, keys) @ values
        numerator += q_rows @ (entering[:, :, :-1] * to_middle)
        weighted = numerator[..., :-1]
        below = q.shape[3] ** 0.5 if eps is None else numerator[..., -1:] + eps
        output = weighted / below
        ctx.save_for_backward(q_rows, keys, values, grow, to_middle, from_middle, entering, output)
        ctx.below, ctx.normalise, ctx.chunk = below, eps is not None, chunk
        return _joined(output, chunk, q.shape), entering[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with full_precision(grads[0]):
            return (*_gradients(ctx, *grads), None, None)


def _gradients(
    ctx: Any, by_output: torch.Tensor, by_after: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, g and the state."""
    q, k, v, grow, to_middle, from_middle, entering, output = ctx.saved_tensors
    batch, time, heads, _ = by_output.shape
    dn = torch.zeros_like(output[..., :1]).expand(*output.shape[:-1], v.shape[-1]).clone()
    dn[..., :-1] = _chunks(by_output, k.shape[1], ctx.chunk).flatten(3, 4) / ctx.below
    if ctx.normalise:
        dn[..., -1] = -(dn[..., :-1] * output).sum(dim=-1)
    by_weights = _causal(dn @ v.mT)
    dq = by_weights @ k
    dq += dn @ (entering[:, :, :-1] * to_middle).mT
    by_entering = (q.mT @ dn).mul_(to_middle)
    leaving = _scan((to_middle * from_middle).flip(2), by_entering.flip(2), by_after).flip(2)
    by_added = leaving[:, :, 1:] * from_middle
    dk = by_weights.mT @ q
    dk += v @ by_added.mT
    dv = None
    if ctx.needs_input_grad[2]:  # frozen values, as in the first stage of training, need none
        dv = _weights(q, k).mT @ dn
        dv += k @ by_added
    by_rows = (q * dq).unflatten(3, (-1, ctx.chunk)).sum(dim=3) - k * dk
    carry = (entering[:, :, 1:] * leaving[:, :, 1:]).sum(dim=-1)
    dg = _reverse_cumulative(by_rows) + carry[..., None, :]
    dq = dq.unflatten(3, (-1, ctx.chunk)) * grow[:, :, :, None]
    shape = (batch, time, k.shape[1])
    return (
        _joined(dq.flatten(3, 4), ctx.chunk, (batch, time, heads)),
        _joined(dk / grow, ctx.chunk, shape),
        None if dv is None else _joined(dv[..., :-1], ctx.chunk, shape),
        _joined(dg, ctx.chunk, shape),
        leaving[:, :, 0],
    )


def _chunks(x: torch.Tensor, states: int, chunk: int) -> torch.Tensor:
    """`[B, T, S G, W]` to a new `[B, S, N, G, C, W]`, T filled up with zeros."""
    batch, time, heads, width = x.shape
    whole = functional.pad(x, (0, 0, 0, 0, 0, -time % chunk)) if time % chunk else x
    apart = whole.reshape(batch, -1, chunk, states, heads // states, width)
    return apart.permute(0, 3, 1, 4, 2, 5).clone(memory_format=torch.contiguous_format)


def _joined(x: torch.Tensor, chunk: int, shape: Sequence[int]) -> torch.Tensor:
    """`[B, S, N, G C, W]` back to `[B, T, S G, W]`, where `shape` begins with B, T, S G."""
    batch, time, heads = shape[:3]
    apart = x.reshape(batch, x.shape[1], x.shape[2], -1, chunk, x.shape[4])
    return apart.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, x.shape[4])[:, :time]


def _scan(decay: torch.Tensor, added: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """State before each chunk and after the last, `[B, S, N + 1, F, V]`."""
    count = added.shape[2]
    states = added.new_empty(*added.shape[:2], count + 1, *added.shape[3:])
    states[:, :, 0] = state
    for n in range(count):
        torch.addcmul(added[:, :, n], decay[:, :, n], states[:, :, n], out=states[:, :, n + 1])
    return states


def _weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """P of all rows, `[B, S, N, G C, C]`."""
    return _causal(q @ k.mT)


def _causal(pairs: torch.Tensor) -> torch.Tensor:
    """`pairs [B, S, N, G C, C]` with zeros where a column is later than its row."""
    chunk = pairs.shape[-1]
    pairs.view(*pairs.shape[:3], -1, chunk, chunk).tril_()
    return pairs


def _cumulative(g: torch.Tensor) -> torch.Tensor:
    """Inclusive sums over the tokens of a chunk."""
    return g.new_ones(g.shape[-2], g.shape[-2]).tril() @ g


def _reverse_cumulative(x: torch.Tensor) -> torch.Tensor:
    return x.new_ones(x.shape[-2], x.shape[-2]).triu() @ x
