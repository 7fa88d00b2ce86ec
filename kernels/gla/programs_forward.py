"""Gated linear attention forward, in Triton; `README.md` beside it has the maths.

Tokens of all sequences lie in one row, `[tokens, heads, width]`. Sequence n has the tokens from
`offsets[n]` to `offsets[n + 1]` and the chunks from `first[n]` on; chunk c belongs to sequence
`owner[c]`. Two passes forward: states from chunk to chunk, then every chunk's output on its own.
Backward mirrors them: states again, their gradients in reverse, then every chunk on its own.

    h [chunks, S, F, V]    values' state entering each chunk       z [chunks, S, F]    keys' sum
    dh, dz                 gradients of the state leaving it       den [tokens, H]     n_t[V] + eps

Sizes: S state heads, G query heads of each, C tokens of a chunk, F features, V values; BF and
BV are blocks of features and values. GATES is F, or 1 for one gate per head. Gates are clamped at
-BOUND, so that every factor of a chunk, measured from its middle row, stays finite. `OP` is the
type of what enters matrix products; no result of one is ever transposed.
"""

import triton
import triton.language as tl

__all__ = [
    "before_middle",
    "decay",
    "entering",
    "forward_outputs",
    "forward_states",
    "forward_steps",
    "forward_whole",
    "leave",
    "put",
    "put_state",
    "spread",
    "tile",
]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def spread(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid axis 0: what it counts, and the block; blocks that read the same run side by side."""
    blocks: tl.constexpr = tl.cdiv(WIDTH, BLOCK)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def tile(pointer, i_t, o_c, m_c, i_head, o_col, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """One head's rows from token `i_t` on, in fp32; 0 outside.

    Offsets count from there: 32 bits are enough, and take half the registers.
    """
    p_first = pointer + (i_t * HEADS + i_head) * WIDTH
    at = o_c[:, None] * (HEADS * WIDTH) + o_col[None, :]
    mask = m_c[:, None] & (o_col[None, :] < WIDTH)
    return tl.load(p_first + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def put(
    pointer, value, i_t, o_c, m_c, i_head, o_col, HEADS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Write what `tile` reads."""
    p_first = pointer + (i_t * HEADS + i_head) * WIDTH
    at = o_c[:, None] * (HEADS * WIDTH) + o_col[None, :]
    mask = m_c[:, None] & (o_col[None, :] < WIDTH)
    tl.store(p_first + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def decay(
    g, i_t, o_c, m_c, i_head, o_f,
    HEADS: tl.constexpr, GATES: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Log decay in base 2, clamped, and its inclusive sum over the chunk, `[C, BF]`.

    One gate per head counts for all features: what is `[C, 1]` finds too few registers, and Triton
    3.6 cannot sum along it.
    """
    if GATES == 1:
        at = i_t * HEADS + i_head + o_c[:, None] * HEADS + (o_f * 0)[None, :]
        b_g = tl.load(g + at, mask=m_c[:, None], other=0.0).to(tl.float32)
    else:
        b_g = tile(g, i_t, o_c, m_c, i_head, o_f, HEADS, GATES)
    # Not `maximum`, which makes a number of NaN: a gate that diverges must show.
    b_g = tl.where(b_g < -BOUND, -BOUND, b_g) * LOG2E
    return b_g, tl.cumsum(b_g, 0)


@triton.jit
def before_middle(b_g, C: tl.constexpr):
    """What has decayed before the chunk's middle row: the anchor, `[BF]`."""
    early = tl.arange(0, C)[:, None] < C // 2
    return tl.sum(tl.where(early, b_g, 0.0), 0)


@triton.jit
def _advanced(b_h, b_z, b_k, b_v, b_b, b_last, OP: tl.constexpr, DOT: tl.constexpr):
    """State and sum of keys after a chunk."""
    b_kk = b_k * tl.exp2(b_last[None, :] - b_b)
    by_decay = tl.exp2(b_last)
    update = tl.dot(tl.trans(b_kk.to(OP)), b_v.to(OP), input_precision=DOT)
    return b_h * by_decay[:, None] + update, b_z * by_decay + tl.sum(b_kk, 0)


@triton.jit
def entering(
    state, i_sequence, i_s, o_f, o_v,
    S: tl.constexpr, F: tl.constexpr, V: tl.constexpr, GIVEN: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """State `[BF, BV]` and sum of keys `[BF]` of one head of `state [N, S, F, V + 1]`."""
    b_h = tl.zeros([BF, BV], dtype=tl.float32)
    b_z = tl.zeros([BF], dtype=tl.float32)
    if GIVEN:
        p_row = state + ((i_sequence.to(tl.int64) * S + i_s) * F + o_f) * (V + 1)
        m_f = o_f < F
        mask = m_f[:, None] & (o_v[None, :] < V)
        b_h += tl.load(p_row[:, None] + o_v[None, :], mask=mask, other=0.0)
        b_z += tl.load(p_row + V, mask=m_f, other=0.0)
    return b_h, b_z


@triton.jit
def leave(
    state, b_h, b_z, i_sequence, i_s, o_f, o_v, i_v,
    S: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Write what `entering` reads; the sum of keys with block 0 of the values."""
    p_row = state + ((i_sequence.to(tl.int64) * S + i_s) * F + o_f) * (V + 1)
    m_f = o_f < F
    tl.store(p_row[:, None] + o_v[None, :], b_h, mask=m_f[:, None] & (o_v[None, :] < V))
    if i_v == 0:
        tl.store(p_row + V, b_z, mask=m_f)


@triton.jit
def put_state(
    h, z, b_h, b_z, i_chunk, i_s, o_f, o_v,
    S: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Write one head's state at a chunk, all of its values."""
    i_row = (i_chunk.to(tl.int64) * S + i_s) * F + o_f
    m_f = o_f < F
    mask = m_f[:, None] & (o_v[None, :] < V)
    p_h = h + i_row[:, None] * V + o_v[None, :]
    tl.store(p_h, b_h.to(h.dtype.element_ty), mask=mask)
    tl.store(z + i_row, b_z, mask=m_f)


@triton.jit
def forward_states(
    k, v, g, state, h, z, after, offsets, first,
    S: tl.constexpr, F: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr, C: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, BOUND: tl.constexpr,
    GIVEN: tl.constexpr, OP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """States entering every chunk and after the last; grid (N S blocks of features)."""
    i_ns, i_f = spread(F, BF)
    i_n, i_s = i_ns // S, i_ns % S
    begin, end = tl.load(offsets + i_n).to(tl.int64), tl.load(offsets + i_n + 1).to(tl.int64)
    i_first = tl.load(first + i_n)
    o_c, o_v, o_f = tl.arange(0, C), tl.arange(0, BV), i_f * BF + tl.arange(0, BF)
    b_h, b_z = entering(state, i_n, i_s, o_f, o_v, S, F, V, GIVEN, BF, BV)
    for i in range(tl.cdiv(end - begin, C).to(tl.int32)):
        put_state(h, z, b_h, b_z, i_first + i, i_s, o_f, o_v, S, F, V)
        i_t = begin + i * C
        m_c = o_c < end - i_t
        b_g, b_b = decay(g, i_t, o_c, m_c, i_s, o_f, S, GATES, BOUND)
        b_k = tile(k, i_t, o_c, m_c, i_s, o_f, S, F)
        b_v = tile(v, i_t, o_c, m_c, i_s, o_v, S, V)
        b_h, b_z = _advanced(b_h, b_z, b_k, b_v, b_b, tl.sum(b_g, 0), OP, DOT)
    leave(after, b_h, b_z, i_n, i_s, o_f, o_v, 0, S, F, V)


@triton.jit
def _chunk_output(
    q, k, v, o, den, b_h, b_z, b_g, b_b, i_t, o_c, m_c, i_head, i_s, o_f, o_v, i_v, eps,
    HEADS: tl.constexpr, S: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, OP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One query head's output in one chunk, from the state entering it."""
    b_r = before_middle(b_g, C)[None, :]
    b_qa = tile(q, i_t, o_c, m_c, i_head, o_f, HEADS, F) * tl.exp2(b_b - b_r)
    b_qb = b_qa * tl.exp2(b_r)
    b_o = tl.dot(b_qb.to(OP), b_h.to(OP), input_precision=DOT)
    b_den = tl.sum(b_qb * b_z[None, :], 1) + eps
    b_ka = (tile(k, i_t, o_c, m_c, i_s, o_f, S, F) * tl.exp2(b_r - b_b)).to(OP)
    b_p = tl.dot(b_qa.to(OP), tl.trans(b_ka), input_precision=DOT)
    causal = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    b_p = tl.where(causal, b_p, 0.0)
    b_v = tile(v, i_t, o_c, m_c, i_s, o_v, S, V).to(OP)
    b_o += tl.dot(b_p.to(OP), b_v, input_precision=DOT)
    if NORMALISE:
        b_den += tl.sum(b_p, 1)
        b_o = b_o / b_den[:, None]
        if i_v == 0:
            tl.store(den + i_t * HEADS + i_head + o_c * HEADS, b_den, mask=m_c)
    else:
        b_o = b_o * SCALE
    put(o, b_o, i_t, o_c, m_c, i_head, o_v, HEADS, V)


@triton.jit
def forward_outputs(
    q, k, v, g, h, z, o, den, offsets, first, owner, sequences, eps,
    S: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BOUND: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, OP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Outputs of every chunk; grid (chunks blocks of values, H)."""
    i_c, i_v = spread(V, BV)
    i_head = tl.program_id(1)
    i_n, i_s = tl.load(owner + i_c), i_head // G
    if i_n >= sequences:
        return
    begin, end = tl.load(offsets + i_n).to(tl.int64), tl.load(offsets + i_n + 1).to(tl.int64)
    i_t = begin + (i_c - tl.load(first + i_n)) * C
    o_c = tl.arange(0, C)
    m_c = o_c < end - i_t
    o_f = tl.arange(0, BF)
    o_v = i_v * BV + tl.arange(0, BV)
    i_row = (i_c.to(tl.int64) * S + i_s) * F + o_f
    m_f = o_f < F
    m_h = m_f[:, None] & (o_v[None, :] < V)
    b_h = tl.load(h + i_row[:, None] * V + o_v[None, :], mask=m_h, other=0.0).to(tl.float32)
    b_z = tl.load(z + i_row, mask=m_f, other=0.0)
    b_g, b_b = decay(g, i_t, o_c, m_c, i_s, o_f, S, GATES, BOUND)
    _chunk_output(
        q, k, v, o, den, b_h, b_z, b_g, b_b, i_t, o_c, m_c, i_head, i_s, o_f, o_v, i_v, eps,
        S * G, S, F, V, C, NORMALISE, SCALE, OP, DOT,
    )  # fmt: skip


@triton.jit
def forward_whole(
    q, k, v, g, state, o, den, after, offsets, eps,
    S: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BOUND: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, GIVEN: tl.constexpr,
    OP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Both passes in one, the state never leaving the chip; grid (N S blocks of values)."""
    i_ns, i_v = spread(V, BV)
    i_n, i_s = i_ns // S, i_ns % S
    begin, end = tl.load(offsets + i_n).to(tl.int64), tl.load(offsets + i_n + 1).to(tl.int64)
    o_c, o_f = tl.arange(0, C), tl.arange(0, BF)
    o_v = i_v * BV + tl.arange(0, BV)
    b_h, b_z = entering(state, i_n, i_s, o_f, o_v, S, F, V, GIVEN, BF, BV)
    for i in range(tl.cdiv(end - begin, C).to(tl.int32)):
        i_t = begin + i * C
        m_c = o_c < end - i_t
        b_g, b_b = decay(g, i_t, o_c, m_c, i_s, o_f, S, GATES, BOUND)
        for i_g in range(G):
            _chunk_output(
                q, k, v, o, den, b_h, b_z, b_g, b_b, i_t, o_c, m_c, i_s * G + i_g, i_s, o_f, o_v,
                i_v, eps, S * G, S, F, V, C, NORMALISE, SCALE, OP, DOT,
            )  # fmt: skip
        # Read again rather than kept: there are no registers for both halves at once.
        b_g, b_b = decay(g, i_t, o_c, m_c, i_s, o_f, S, GATES, BOUND)
        b_k = tile(k, i_t, o_c, m_c, i_s, o_f, S, F)
        b_v = tile(v, i_t, o_c, m_c, i_s, o_v, S, V)
        b_h, b_z = _advanced(b_h, b_z, b_k, b_v, b_b, tl.sum(b_g, 0), OP, DOT)
    leave(after, b_h, b_z, i_n, i_s, o_f, o_v, i_v, S, F, V)


@triton.jit
def forward_steps(
    q, k, v, g, state, o, after, offsets, eps,
    S: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, BOUND: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """One token after another, for few of them; grid (N S blocks of values)."""
    i_ns, i_v = spread(V, BV)
    i_n, i_s = i_ns // S, i_ns % S
    begin, end = tl.load(offsets + i_n).to(tl.int64), tl.load(offsets + i_n + 1).to(tl.int64)
    o_f = tl.arange(0, BF)
    o_v = i_v * BV + tl.arange(0, BV)
    m_f, m_v = o_f < F, o_v < V
    o_g = o_f if GATES == F else o_f * 0
    b_h, b_z = entering(state, i_n, i_s, o_f, o_v, S, F, V, GIVEN, BF, BV)
    for i in range((end - begin).to(tl.int32)):
        i_row = (begin + i) * S + i_s
        b_g = tl.load(g + i_row * GATES + o_g, mask=m_f, other=0.0).to(tl.float32)
        b_k = tl.load(k + i_row * F + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_v = tl.load(v + i_row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        by_decay = tl.exp2(tl.where(b_g < -BOUND, -BOUND, b_g) * LOG2E)
        b_h = b_h * by_decay[:, None] + b_k[:, None] * b_v[None, :]
        b_z = b_z * by_decay + b_k
        for i_g in range(G):
            i_head = i_row * G + i_g
            b_q = tl.load(q + i_head * F + o_f, mask=m_f, other=0.0).to(tl.float32)
            b_o = tl.sum(b_q[:, None] * b_h, 0)
            if NORMALISE:
                b_o = b_o / (tl.sum(b_q * b_z, 0) + eps)
            else:
                b_o = b_o * SCALE
            tl.store(o + i_head * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    leave(after, b_h, b_z, i_n, i_s, o_f, o_v, i_v, S, F, V)
