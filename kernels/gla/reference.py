"""Normalised gated linear attention, three equal forms in plain PyTorch (LAWCAT, arXiv 2509.18467).

Shapes: B batch, T time, H query heads, S state heads (H a multiple of S; query head h reads state
head h // (H / S)), F features, V value width. Layout `[B, T, heads, width]`.

With alpha_t = exp(g_t) per state row and v+ = [v, 1]:

    S_t = diag(alpha_t) S_{t-1} + k_t v+_t^T
    n_t = q_t^T S_t
    o_t = n_t[:V] / (n_t[V] + eps)

The last state column is the decayed sum of keys, so o_t is a weighted mean of values. With
`normalise=False` o_t is n_t[:V] F^-1/2 instead, plain gated linear attention (arXiv 2312.06635);
the last column is then carried but not read, so that the state keeps its layout. q and k must be
non-negative (a feature map's output) and g must lie in [-2.5, 0] for `chunked_gla`, whose
mid-chunk anchor keeps every factor below e^80; `recurrent_gla` and `parallel_gla` take any g <= 0.
For chunk rows t >= s and anchor row m, exp(b_t - b_s) = exp(b_t - b_m) exp(b_m - b_s).

With `cu_seqlens [N + 1]` the one row of the batch holds N sequences, and there is a state for each.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from edgekit.errors import UsageError
from edgekit.kernels.sequences import sequence_offsets

__all__ = [
    "GATE_BOUND",
    "Output",
    "chunked_gla",
    "over_sequences",
    "parallel_gla",
    "recurrent_gla",
]

Output = tuple[torch.Tensor, torch.Tensor]
GATE_BOUND = 2.5  # of a log decay: 32 rows from a chunk's middle to its end make e^80


def recurrent_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    normalise: bool = True,
    cu_seqlens: torch.Tensor | None = None,
) -> Output:
    """One token after another: the definition, and the decode step.

    Args:
        q: features of the queries, `[B, T, H, F]`.
        k: features of the keys, `[B, T, S, F]`; 0 on padding.
        v: values `[B, T, S, V]`.
        g: log decay `[B, T, S, F]`, or `[B, T, S, 1]` for one that all features share; <= 0; 0 on
            padding.
        state: `[N, S, F, V + 1]` entering the first token, or None for zeros; N is B or the number
            of packed sequences.
        eps: added to the denominator.
        normalise: divide by the denominator; False scales by F^-1/2.
        cu_seqlens: where packed sequences begin, and the end of the last: integers `[N + 1]`; B
            must be 1. None: every row is a sequence.

    Returns:
        The output `[B, T, H, V]` and the state `[N, S, F, V + 1]` after the last token.

    Raises:
        UsageError: if `cu_seqlens` does not fit the batch.
    """
    if cu_seqlens is not None:
        return over_sequences(recurrent_gla, q, k, v, g, state, cu_seqlens, eps, normalise)
    values = functional.pad(v, (0, 1), value=1.0)
    running = _zeros(k, values) if state is None else state
    outputs = []
    for t in range(q.shape[1]):
        update = k[:, t, :, :, None] * values[:, t, :, None, :]
        running = g[:, t, :, :, None].exp() * running + update
        outputs.append(_grouped(q[:, t, None], k.shape[2])[:, :, :, 0] @ running)
    return _finished(torch.stack(outputs, dim=3), q, eps, normalise), running


def parallel_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    normalise: bool = True,
    cu_seqlens: torch.Tensor | None = None,
) -> Output:
    """All pairs at once, quadratic in T, without anchors; arguments of `recurrent_gla`."""
    if cu_seqlens is not None:
        return over_sequences(parallel_gla, q, k, v, g, state, cu_seqlens, eps, normalise)
    g = g.expand(k.shape)
    values = functional.pad(v, (0, 1), value=1.0).transpose(1, 2)  # [B, S, T, V+1]
    b = g.cumsum(dim=1).transpose(1, 2)  # [B, S, T, F]
    keys = k.transpose(1, 2)
    queries = _grouped(q, k.shape[2])  # [B, S, G, T, F]
    difference = b[:, :, :, None] - b[:, :, None, :]  # [B, S, T, T, F]
    causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    decay = difference.masked_fill(~causal[..., None], -torch.inf).exp()
    weights = torch.einsum("bsgtf,bsuf,bstuf->bsgtu", queries, keys, decay)
    entering = _zeros(k, values) if state is None else state
    numerator = (
        weights @ values[:, :, None] + (queries * b.exp()[:, :, None]) @ entering[:, :, None]
    )
    final = b[:, :, -1, :, None].exp() * entering
    final = final + (keys * (b[:, :, -1:] - b).exp()).transpose(2, 3) @ values
    return _finished(numerator, q, eps, normalise), final


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
    chunk: int = 64,
) -> Output:
    """Chunks of at most 64 tokens in turn: linear in T, all matrix products."""
    if cu_seqlens is not None:
        return over_sequences(
            chunked_gla, q, k, v, g, state, cu_seqlens, eps, normalise, chunk=chunk
        )
    values = functional.pad(v, (0, 1), value=1.0).transpose(1, 2)
    keys, gates, queries = k.transpose(1, 2), g.transpose(1, 2), _grouped(q, k.shape[2])
    running = _zeros(k, values) if state is None else state
    pieces = []
    for start in range(0, q.shape[1], chunk):
        rows = slice(start, start + chunk)
        piece, running = _one_chunk(
            queries[..., rows, :], keys[:, :, rows], values[:, :, rows], gates[:, :, rows], running
        )
        pieces.append(piece)
    return _finished(torch.cat(pieces, dim=3), q, eps, normalise), running


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Check what `recurrent_gla` was given.

    Raises:
        UsageError: if shapes do not fit.
    """
    if k.shape[:3] != v.shape[:3] or k.shape[:3] != g.shape[:3] or k.shape[3] != q.shape[3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, g))
        raise UsageError(
            f"q, k, v, g {shapes} given; allowed: [B, T, H, F], [B, T, S, F], [B, T, S, V] and "
            "[B, T, S, F or 1]"
        )
    if q.shape[:2] != k.shape[:2] or q.shape[2] % k.shape[2]:
        raise UsageError(f"{q.shape[2]} heads given; allowed: a multiple of {k.shape[2]} states")
    if g.shape[3] not in (1, q.shape[3]):
        raise UsageError(f"gates of {g.shape[3]} rows given; allowed: 1 or {q.shape[3]}")
    sequences = len(q) if cu_seqlens is None else cu_seqlens.numel() - 1
    entering = (sequences, *k.shape[2:], v.shape[3] + 1)
    if state is not None and state.shape != entering:
        raise UsageError(f"state {list(state.shape)} given; allowed: {list(entering)}")


def over_sequences(
    form: Callable[..., Output],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    eps: float,
    normalise: bool,
    **options: Any,
) -> Output:
    """`form` on one packed sequence after another."""
    offsets = sequence_offsets(q, cu_seqlens).tolist()
    outputs, states = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(offsets)):
        entering = None if state is None else state[n : n + 1]
        if begin == end:  # nothing to read
            empty = k.new_zeros(1, k.shape[2], k.shape[3], v.shape[3] + 1)
            states.append(empty if entering is None else entering)
            continue
        piece = (x[:, begin:end] for x in (q, k, v, g))
        output, after = form(*piece, entering, eps=eps, normalise=normalise, **options)
        outputs.append(output)
        states.append(after)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _one_chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> Output:
    b = g.cumsum(dim=2)  # [B, S, C, F], inclusive
    anchor = b[:, :, b.shape[2] // 2, None]
    last = b[:, :, -1:]
    weights = (q * (b - anchor).exp()[:, :, None]) @ (k * (anchor - b).exp())[:, :, None].mT
    weights = torch.where(torch.ones_like(weights, dtype=torch.bool).tril(), weights, 0.0)
    output = weights @ v[:, :, None] + (q * b.exp()[:, :, None]) @ state[:, :, None]
    state = last.mT.exp() * state + (k * (last - b).exp()).mT @ v
    return output, state


def _zeros(k: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], values.shape[-1])


def _grouped(q: torch.Tensor, state_heads: int) -> torch.Tensor:
    """`[B, T, H, F]` to `[B, S, G, T, F]`."""
    batch, time, heads, features = q.shape
    grouped = q.reshape(batch, time, state_heads, heads // state_heads, features)
    return grouped.permute(0, 2, 3, 1, 4)


def _finished(
    numerator: torch.Tensor, q: torch.Tensor, eps: float, normalise: bool
) -> torch.Tensor:
    """Divide `[B, S, G, T, V + 1]` by its last column, or scale it, and return `[B, T, H, V]`."""
    values = numerator[..., :-1]
    output = values / (numerator[..., -1:] + eps) if normalise else values * q.shape[-1] ** -0.5
    return output.permute(0, 3, 1, 2, 4).flatten(2, 3)
