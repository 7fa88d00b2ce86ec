"""Gated linear attention backward, in Triton; the layout is that of `programs_forward.py`.

States' gradients go from chunk to chunk in reverse; then every chunk is on its own, first the
gradients of q, from which those of g follow together with k's.
"""

import triton
import triton.language as tl

from edgekit.kernels.gla.programs_forward import (
    before_middle,
    decay,
    entering,
    leave,
    put,
    put_state,
    spread,
    tile,
)

__all__ = [
    "backward_keys",
    "backward_queries",
    "backward_rows",
    "backward_states",
    "backward_values",
]

# Where the largest gradient of a numerator is brought, by powers of two, and by how many at most:
# a factor of a chunk may be e^80, or 2^115, and sums over values and keys must still fit.
RAISED_TO, MOST_RAISED = tl.constexpr(-12.0), tl.constexpr(60.0)


@triton.jit
def backward_rows(
    o, do, den, de, top, rows,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Gradient of every denominator, -(do . o) / den; grid (blocks of rows).

    `top [1]`, 0 before, becomes the largest gradient of a numerator.
    """
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_v = tl.arange(0, BV)
    m_r = o_r < rows
    at = o_r[:, None] * V + o_v[None, :]
    mask = m_r[:, None] & (o_v[None, :] < V)
    b_dn = tl.load(do + at, mask=mask, other=0.0).to(tl.float32)
    if NORMALISE:
        b_dn = b_dn / tl.load(den + o_r, mask=m_r, other=1.0)[:, None]
        b_o = tl.load(o + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(de + o_r, -tl.sum(b_o * b_dn, 1), mask=m_r)
    tl.atomic_max(top, tl.max(tl.abs(b_dn)), sem="relaxed")


@triton.jit
def _raised(top):
    """The power of two that brings the largest gradient of a numerator to about 2^-12.

    A factor of a chunk is as small as e^-80: gradients of 1e-6 times it are no fp32 numbers.
    """
    b_top = tl.load(top)
    power = tl.minimum(RAISED_TO - tl.floor(tl.log2(b_top)), MOST_RAISED)
    return tl.where((b_top > 0.0) & (b_top < float("inf")), tl.exp2(power), 1.0)


@triton.jit
def _by_numerator(
    do, den, de, raised, i_t, o_c, m_c, i_head, o_v,
    HEADS: tl.constexpr, V: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradients of a query head's numerator `[C, BV]` and denominator `[C]`, raised."""
    b_do = tile(do, i_t, o_c, m_c, i_head, o_v, HEADS, V)
    if NORMALISE:
        b_den = tl.load(den + i_t * HEADS + i_head + o_c * HEADS, mask=m_c, other=1.0)
        b_de = tl.load(de + i_t * HEADS + i_head + o_c * HEADS, mask=m_c, other=0.0) * raised
        b_dn = b_do * raised / b_den[:, None]
    else:
        b_dn = b_do * (raised * SCALE)
        b_de = tl.sum(b_do, 1) * 0.0
    return b_dn, b_de


@triton.jit
def _agreement(b_h, b_z, b_dh, b_dz):
    """A state times its gradient, summed over columns `[BF]`: by how much its decay matters."""
    return tl.sum(b_h * b_dh, 1) + b_z * b_dz


@triton.jit
def backward_states(
    q, g, do, den, de, top, h, z, after, by_after, dh, dz, carry, by_state, offsets, first,
    S: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BOUND: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, OP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of the state leaving every chunk, and of the first; grid (N S blocks of features).

    `carry [chunks, S, F]` is what the states after a chunk say of its decay; dh, dz and carry are
    raised.
    """
    i_ns, i_f = spread(F, BF)
    i_n, i_s = i_ns // S, i_ns % S
    begin, end = tl.load(offsets + i_n).to(tl.int64), tl.load(offsets + i_n + 1).to(tl.int64)
    i_first = tl.load(first + i_n)
    count = tl.cdiv(end - begin, C).to(tl.int32)
    o_c, o_v, o_f = tl.arange(0, C), tl.arange(0, BV), i_f * BF + tl.arange(0, BF)
    m_f = o_f < F
    m_h = m_f[:, None] & (o_v[None, :] < V)
    raised = _raised(top)
    b_dh, b_dz = entering(by_after, i_n, i_s, o_f, o_v, S, F, V, True, BF, BV)
    b_dh, b_dz = b_dh * raised, b_dz * raised
    b_h, b_z = entering(after, i_n, i_s, o_f, o_v, S, F, V, True, BF, BV)
    b_carry = _agreement(b_h, b_z, b_dh, b_dz)
    for back in range(count):
        i = count - 1 - back
        i_row = ((i_first + i).to(tl.int64) * S + i_s) * F
        put_state(dh, dz, b_dh, b_dz, i_first + i, i_s, o_f, o_v, S, F, V)
        tl.store(carry + i_row + o_f, b_carry, mask=m_f)
        i_t = begin + i * C
        m_c = o_c < end - i_t
        b_g, b_b = decay(g, i_t, o_c, m_c, i_s, o_f, S, GATES, BOUND)
        by_decay = tl.exp2(tl.sum(b_g, 0))
        b_dh, b_dz = b_dh * by_decay[:, None], b_dz * by_decay
        for i_g in range(G):
            i_head = i_s * G + i_g
            b_qb = tile(q, i_t, o_c, m_c, i_head, o_f, S * G, F) * tl.exp2(b_b)
            b_dn, b_de = _by_numerator(
                do, den, de, raised, i_t, o_c, m_c, i_head, o_v, S * G, V, NORMALISE, SCALE
            )
            b_dh += tl.dot(tl.trans(b_qb.to(OP)), b_dn.to(OP), input_precision=DOT)
            b_dz += tl.sum(b_qb * b_de[:, None], 0)
        p_h = h + i_row * V + o_f[:, None] * V + o_v[None, :]
        b_h = tl.load(p_h, mask=m_h, other=0.0).to(tl.float32)
        b_z = tl.load(z + i_row + o_f, mask=m_f, other=0.0)
        b_carry = _agreement(b_h, b_z, b_dh, b_dz)
    leave(by_state, b_dh / raised, b_dz / raised, i_n, i_s, o_f, o_v, 0, S, F, V)


@triton.jit
def backward_queries(
    q, k, v, g, do, den, de, top, h, z, dq, offsets, first, owner, sequences,
    S: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BOUND: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, OP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of q in every chunk; grid (chunks blocks of features, H)."""
    i_c, i_f = spread(F, BF)
    i_head = tl.program_id(1)
    i_n, i_s = tl.load(owner + i_c), i_head // G
    if i_n >= sequences:
        return
    begin, end = tl.load(offsets + i_n).to(tl.int64), tl.load(offsets + i_n + 1).to(tl.int64)
    i_t = begin + (i_c - tl.load(first + i_n)) * C
    o_c, o_v, o_f = tl.arange(0, C), tl.arange(0, BV), i_f * BF + tl.arange(0, BF)
    m_c, m_f = o_c < end - i_t, o_f < F
    p_row = (i_c.to(tl.int64) * S + i_s) * F
    raised = _raised(top)
    b_dn, b_de = _by_numerator(
        do, den, de, raised, i_t, o_c, m_c, i_head, o_v, S * G, V, NORMALISE, SCALE
    )
    b_dn = b_dn.to(OP)
    m_h = m_f[:, None] & (o_v[None, :] < V)
    b_h = tl.load(h + p_row * V + o_f[:, None] * V + o_v[None, :], mask=m_h, other=0.0).to(OP)
    b_z = tl.load(z + p_row + o_f, mask=m_f, other=0.0)
    b_dq = tl.dot(b_dn, tl.trans(b_h), input_precision=DOT) + b_de[:, None] * b_z[None, :]
    b_v = tile(v, i_t, o_c, m_c, i_s, o_v, S, V).to(OP)
    b_dp = tl.dot(b_dn, tl.trans(b_v), input_precision=DOT) + b_de[:, None]
    b_dp = tl.where(o_c[:, None] >= o_c[None, :], b_dp, 0.0)
    b_g, b_b = decay(g, i_t, o_c, m_c, i_s, o_f, S, GATES, BOUND)
    b_r = before_middle(b_g, C)[None, :]
    b_ka = (tile(k, i_t, o_c, m_c, i_s, o_f, S, F) * tl.exp2(b_r - b_b)).to(OP)
    b_dq = b_dq * tl.exp2(b_r) + tl.dot(b_dp.to(OP), b_ka, input_precision=DOT)
    b_dq = b_dq * tl.exp2(b_b - b_r) / raised
    put(dq, b_dq, i_t, o_c, m_c, i_head, o_f, S * G, F)


@triton.jit
def backward_keys(
    q, k, v, g, do, den, de, top, dh, dz, carry, dq, dk, dv, dg, offsets, first, owner, sequences,
    S: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BOUND: tl.constexpr,
    WITH_VALUES: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr,
    OP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of k and g in every chunk, from those of q; grid (chunks blocks of features, S).

    With one block of features those of v come at little cost. One gate per head gets a share from
    every block: `dg [blocks, tokens, S]`.
    """
    i_c, i_f = spread(F, BF)
    i_s = tl.program_id(1)
    i_n = tl.load(owner + i_c)
    if i_n >= sequences:
        return
    begin, end = tl.load(offsets + i_n).to(tl.int64), tl.load(offsets + i_n + 1).to(tl.int64)
    i_t = begin + (i_c - tl.load(first + i_n)) * C
    o_c, o_v, o_f = tl.arange(0, C), tl.arange(0, BV), i_f * BF + tl.arange(0, BF)
    m_c, m_f = o_c < end - i_t, o_f < F
    p_row = (i_c.to(tl.int64) * S + i_s) * F
    m_h = m_f[:, None] & (o_v[None, :] < V)
    p_dh = dh + p_row * V + o_f[:, None] * V + o_v[None, :]
    b_dh = tl.load(p_dh, mask=m_h, other=0.0).to(OP)
    b_g, b_b = decay(g, i_t, o_c, m_c, i_s, o_f, S, GATES, BOUND)
    b_r, b_last = before_middle(b_g, C), tl.sum(b_g, 0)
    raised = _raised(top)
    # Keys as the middle row sees them; what is far from it is brought there by one factor a column.
    b_kr = tile(k, i_t, o_c, m_c, i_s, o_f, S, F) * tl.exp2(b_r[None, :] - b_b)
    onward = tl.exp2(b_last - b_r)[None, :]
    b_v = tile(v, i_t, o_c, m_c, i_s, o_v, S, V).to(OP)
    b_dk = tl.dot(b_v, tl.trans(b_dh), input_precision=DOT)
    b_dk += tl.load(dz + p_row + o_f, mask=m_f, other=0.0)[None, :]
    b_dk = b_dk * onward
    early = o_c[:, None] <= o_c[None, :]
    if WITH_VALUES:
        b_ka = b_kr.to(OP)
        b_dv = tl.dot((b_kr * onward).to(OP), b_dh, input_precision=DOT)
    for i_g in range(G):
        i_head = i_s * G + i_g
        b_q = tile(q, i_t, o_c, m_c, i_head, o_f, S * G, F)
        b_qa = (b_q * tl.exp2(b_b - b_r[None, :])).to(OP)
        b_dn, b_de = _by_numerator(
            do, den, de, raised, i_t, o_c, m_c, i_head, o_v, S * G, V, NORMALISE, SCALE
        )
        b_dn = b_dn.to(OP)
        if WITH_VALUES:
            b_pt = tl.where(early, tl.dot(b_ka, tl.trans(b_qa), input_precision=DOT), 0.0)
            b_dv += tl.dot(b_pt.to(OP), b_dn, input_precision=DOT)
        b_dpt = tl.dot(b_v, tl.trans(b_dn), input_precision=DOT) + b_de[None, :]
        b_dk += tl.dot(tl.where(early, b_dpt, 0.0).to(OP), b_qa, input_precision=DOT)
    if WITH_VALUES:
        put(dv, b_dv / raised, i_t, o_c, m_c, i_s, o_v, S, V)
    # Read again rather than kept: k, g and q of the chunk are in the cache, and registers are not.
    b_dk = b_dk * tl.exp2(b_r[None, :] - b_b) / raised
    put(dk, b_dk, i_t, o_c, m_c, i_s, o_f, S, F)
    b_dg = -tile(k, i_t, o_c, m_c, i_s, o_f, S, F) * b_dk
    for i_g in range(G):
        i_head = i_s * G + i_g
        b_q = tile(q, i_t, o_c, m_c, i_head, o_f, S * G, F)
        b_dg += b_q * tile(dq, i_t, o_c, m_c, i_head, o_f, S * G, F)
    b_carry = tl.load(carry + p_row + o_f, mask=m_f, other=0.0) / raised
    b_dg = tl.cumsum(b_dg, 0, reverse=True) + b_carry[None, :]
    if GATES == 1:
        at = i_t * S + i_s + o_c * S
        b_raw = tl.load(g + at, mask=m_c, other=0.0).to(tl.float32)
        b_dg = tl.where(b_raw < -BOUND, 0.0, tl.sum(b_dg, 1))
        p_part = dg + i_f * tl.load(offsets + sequences).to(tl.int64) * S
        tl.store(p_part + at, b_dg.to(dg.dtype.element_ty), mask=m_c)
    else:
        b_raw = tile(g, i_t, o_c, m_c, i_s, o_f, S, GATES)
        put(dg, tl.where(b_raw < -BOUND, 0.0, b_dg), i_t, o_c, m_c, i_s, o_f, S, GATES)


@triton.jit
def backward_values(
    q, k, g, do, den, de, top, dh, dv, offsets, first, owner, sequences,
    S: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BOUND: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, OP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of v in every chunk; grid (chunks blocks of values, S)."""
    i_c, i_v = spread(V, BV)
    i_s = tl.program_id(1)
    i_n = tl.load(owner + i_c)
    if i_n >= sequences:
        return
    begin, end = tl.load(offsets + i_n).to(tl.int64), tl.load(offsets + i_n + 1).to(tl.int64)
    i_t = begin + (i_c - tl.load(first + i_n)) * C
    o_c, o_f = tl.arange(0, C), tl.arange(0, BF)
    o_v = i_v * BV + tl.arange(0, BV)
    m_c, m_h = o_c < end - i_t, (o_f < F)[:, None] & (o_v[None, :] < V)
    b_g, b_b = decay(g, i_t, o_c, m_c, i_s, o_f, S, GATES, BOUND)
    b_r = before_middle(b_g, C)[None, :]
    b_kr = tile(k, i_t, o_c, m_c, i_s, o_f, S, F) * tl.exp2(b_r - b_b)
    p_dh = dh + (i_c.to(tl.int64) * S + i_s) * F * V + o_f[:, None] * V + o_v[None, :]
    b_dh = tl.load(p_dh, mask=m_h, other=0.0).to(OP)
    b_kk = (b_kr * tl.exp2(tl.sum(b_g, 0)[None, :] - b_r)).to(OP)
    b_dv = tl.dot(b_kk, b_dh, input_precision=DOT)
    raised = _raised(top)
    b_ka = b_kr.to(OP)
    early = o_c[:, None] <= o_c[None, :]
    for i_g in range(G):
        i_head = i_s * G + i_g
        b_q = tile(q, i_t, o_c, m_c, i_head, o_f, S * G, F)
        b_qa = (b_q * tl.exp2(b_b - b_r)).to(OP)
        b_pt = tl.where(early, tl.dot(b_ka, tl.trans(b_qa), input_precision=DOT), 0.0)
        b_dn, _ = _by_numerator(
            do, den, de, raised, i_t, o_c, m_c, i_head, o_v, S * G, V, NORMALISE, SCALE
        )
        b_dv += tl.dot(b_pt.to(OP), b_dn.to(OP), input_precision=DOT)
    put(dv, b_dv / raised, i_t, o_c, m_c, i_s, o_v, S, V)
