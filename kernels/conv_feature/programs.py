"""Triton programs of convolution and feature map: one program for some tokens of a head.

Convolution and matrix are one product of K parts. With lag i = 0 the current token, w_i the taps of
that lag and V_i = diag(w_i) W (made by the host),

    u_t = sum_i x_{t-i} V_i         dx_s = sum_i du_{s+i} V_i^T         dV_i = sum_t x_{t-i}^T du_t

so the convolution itself is neither stored nor rounded.

    forward     x -> phi
    carried     x -> the tail that is left
    to_logits   x, dphi -> du
    to_inputs   du -> dx, and the gradient of the tail
    to_lagged   x, du -> dV, one share per program

Places are counted inside a sequence: place 0 is its first token, places -(K-1) to -1 are its tail.
`places` reads any run of them and hides where they come from, so nothing else knows about the
border of a sequence, about padding or about the tail. Shifted runs are read again, from the cache.

Letters: H heads, D inputs and F columns of a head, K taps; BT tokens, BD inputs and BF columns of a
tile, powers of two; ND = ceil(D / BD); i_n sequence, i_h head, i_c chunk, i lag. UP: multiply in
fp32, not in bf16.
"""

import triton
import triton.language as tl


@triton.jit
def operand(b, UP: tl.constexpr):
    """`b` as matrix products take it."""
    return b.to(tl.float32) if UP else b.to(tl.bfloat16)


@triton.jit
def bounds(p_offsets, p_lead, p_last, i_n):
    """A sequence's first row and its length, its first place that is no padding and their end."""
    start = tl.load(p_offsets + i_n)
    length = tl.load(p_offsets + i_n + 1) - start
    lead, last = 0, length
    if p_lead is not None:
        lead, last = tl.load(p_lead + i_n), tl.load(p_last + i_n)
    return start, length, lead, last


@triton.jit
def places(
    p_x, p_tail, start, lead, last, first, i_n, i_h, o_d,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Places `first` to `first + BT`, inputs `o_d` of a head, as an operand; 0 where none are."""
    o_s = first + tl.arange(0, BT)
    m_d = (o_d < D)[None, :]
    o_c = (i_h * D + o_d)[None, :]
    p_tile = p_x + ((start + o_s).to(tl.int64) * (H * D))[:, None] + o_c
    m_s = (o_s >= lead) & (o_s < last)
    b_x = operand(tl.load(p_tile, mask=m_s[:, None] & m_d, other=0.0), UP)
    if p_tail is not None:
        if first < 0:
            o_old = i_n * (K - 1) + o_s + K - 1
            p_old = p_tail + (o_old.to(tl.int64) * (H * D))[:, None] + o_c
            m_old = ((o_s < 0) & (o_s >= 1 - K))[:, None]
            b_x = tl.where(m_old, operand(tl.load(p_old, mask=m_old & m_d, other=0.0), UP), b_x)
    return b_x


@triton.jit
def columns(
    p_rows, start, length, first, i_h, o_f, H: tl.constexpr, W: tl.constexpr, BT: tl.constexpr
):
    """Pointers to columns `o_f` of W of a head, for places from `first` on, and which exist."""
    o_t = first + tl.arange(0, BT)
    o_row = (start + o_t).to(tl.int64) * H + i_h
    m_t = (o_t >= 0) & (o_t < length)
    return p_rows + (o_row * W)[:, None] + o_f[None, :], m_t[:, None]


@triton.jit
def lagged(p_v, i, i_h, o_d, o_f, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """Rows `o_d` of V_i."""
    p_tile = p_v + (((i * H + i_h) * D + o_d) * F)[:, None] + o_f[None, :]
    return tl.load(p_tile, mask=(o_d < D)[:, None] & (o_f < F)[None, :], other=0.0)


@triton.jit
def logits(
    p_x, p_tail, p_v, start, lead, last, first, i_n, i_h,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Logits u of the places from `first` on, fp32 `[BT, BF]`."""
    ND: tl.constexpr = (D + BD - 1) // BD
    o_f = tl.arange(0, BF)
    b_u = tl.zeros([BT, BF], tl.float32)
    for i_k in range(K * ND):
        i = i_k // ND
        o_d = (i_k % ND) * BD + tl.arange(0, BD)
        b_x = places(p_x, p_tail, start, lead, last, first - i, i_n, i_h, o_d, H, D, K, BT, UP)
        b_v = lagged(p_v, i, i_h, o_d, o_f, H, D, F)
        b_u = tl.dot(b_x, operand(b_v, UP), b_u, input_precision="ieee")
    return b_u


@triton.jit
def softmax(b_u, m_f):
    """Over the columns of `m_f`; 0 in the others."""
    b_u = tl.where(m_f, b_u, float("-inf"))
    b_e = tl.exp(b_u - tl.max(b_u, 1)[:, None])
    return b_e * (1.0 / tl.sum(b_e, 1))[:, None]


@triton.jit
def through_softmax(b_p, p_dphi, m_dphi, FLOOR: tl.constexpr):
    """The gradient of a half's logits, from that of its features; none where they are floored."""
    b_dp = tl.load(p_dphi, mask=m_dphi, other=0.0).to(tl.float32)
    b_dp = tl.where(b_p >= FLOOR, b_dp, 0.0)
    return b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])


@triton.jit
def forward(
    p_x, p_tail, p_v, p_offsets, p_lead, p_last, p_first, p_owner, p_phi, count,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, FLOOR: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Features of one chunk of BT tokens."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    i_n = tl.load(p_owner + i_c)
    if i_n >= count:
        return
    start, length, lead, last = bounds(p_offsets, p_lead, p_last, i_n)
    first = (i_c - tl.load(p_first + i_n)) * BT
    b_u = logits(p_x, p_tail, p_v, start, lead, last, first, i_n, i_h, H, D, F, K, BT, BD, BF, UP)
    o_f = tl.arange(0, BF)
    m_f = (o_f < F)[None, :]
    p_tile, m_tile = columns(p_phi, start, length, first, i_h, o_f, H, 2 * F, BT)
    b_up = tl.maximum(softmax(b_u, m_f), FLOOR)
    tl.store(p_tile, b_up.to(p_phi.dtype.element_ty), mask=m_tile & m_f)
    b_down = tl.maximum(softmax(-b_u, m_f), FLOOR)
    tl.store(p_tile + F, b_down.to(p_phi.dtype.element_ty), mask=m_tile & m_f)


@triton.jit
def carried(
    p_x, p_tail, p_offsets, p_lead, p_last, p_after,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The tail that a sequence leaves: its K - 1 places up to the last token."""
    i_n, i_h = tl.program_id(0), tl.program_id(1)
    start, _, lead, last = bounds(p_offsets, p_lead, p_last, i_n)
    o_j, o_d = tl.arange(0, BT), tl.program_id(2) * BD + tl.arange(0, BD)
    b_x = places(p_x, p_tail, start, lead, last, last - (K - 1), i_n, i_h, o_d, H, D, K, BT, True)
    o_row = (i_n * (K - 1) + o_j).to(tl.int64)
    p_tile = p_after + (o_row * (H * D))[:, None] + (i_h * D + o_d)[None, :]
    m_tile = (o_j < K - 1)[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, b_x.to(p_after.dtype.element_ty), mask=m_tile)


@triton.jit
def to_logits(
    p_x, p_tail, p_v, p_offsets, p_lead, p_last, p_first, p_owner, p_dphi, p_du, count,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, FLOOR: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The gradient of u, of one chunk of BT tokens."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    i_n = tl.load(p_owner + i_c)
    if i_n >= count:
        return
    start, length, lead, last = bounds(p_offsets, p_lead, p_last, i_n)
    first = (i_c - tl.load(p_first + i_n)) * BT
    b_u = logits(p_x, p_tail, p_v, start, lead, last, first, i_n, i_h, H, D, F, K, BT, BD, BF, UP)
    o_f = tl.arange(0, BF)
    m_f = (o_f < F)[None, :]
    p_tile, m_tile = columns(p_dphi, start, length, first, i_h, o_f, H, 2 * F, BT)
    b_du = through_softmax(softmax(b_u, m_f), p_tile, m_tile & m_f, FLOOR)
    b_du -= through_softmax(softmax(-b_u, m_f), p_tile + F, m_tile & m_f, FLOOR)
    p_tile, m_tile = columns(p_du, start, length, first, i_h, o_f, H, F, BT)
    tl.store(p_tile, b_du.to(p_du.dtype.element_ty), mask=m_tile & m_f)


@triton.jit
def to_inputs(
    p_du, p_v, p_offsets, p_lead, p_last, p_first, p_owner, p_dafter, p_dx, p_dtail, count,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of BT places; a sequence's chunks begin with its tail."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    i_n = tl.load(p_owner + i_c)
    if i_n >= count:
        return
    start, length, lead, last = bounds(p_offsets, p_lead, p_last, i_n)
    first = (i_c - tl.load(p_first + i_n)) * BT - (K - 1)
    o_d, o_f = tl.program_id(2) * BD + tl.arange(0, BD), tl.arange(0, BF)
    m_d, m_f = (o_d < D)[None, :], (o_f < F)[None, :]
    b_dx = tl.zeros([BT, BD], tl.float32)
    for i in range(K):
        p_tile, m_tile = columns(p_du, start, length, first + i, i_h, o_f, H, F, BT)
        b_du = operand(tl.load(p_tile, mask=m_tile & m_f, other=0.0), UP)
        b_v = operand(lagged(p_v, i, i_h, o_d, o_f, H, D, F), UP)
        b_dx = tl.dot(b_du, tl.trans(b_v), b_dx, input_precision="ieee")

    o_s = first + tl.arange(0, BT)
    o_c = (i_h * D + o_d)[None, :]
    if p_dafter is not None:
        if first + BT > last - (K - 1):
            o_j = o_s - (last - (K - 1))
            p_out = p_dafter + ((i_n * (K - 1) + o_j).to(tl.int64) * (H * D))[:, None] + o_c
            m_out = ((o_j >= 0) & (o_j < K - 1))[:, None]
            b_dx += tl.load(p_out, mask=m_out & m_d, other=0.0).to(tl.float32)
    if p_dtail is not None:
        if first < 0:
            o_old = (i_n * (K - 1) + o_s + K - 1).to(tl.int64)
            p_old = p_dtail + (o_old * (H * D))[:, None] + o_c
            tl.store(p_old, b_dx.to(p_dtail.dtype.element_ty), mask=(o_s < 0)[:, None] & m_d)
    if p_dx is not None:
        b_dx = tl.where(((o_s >= lead) & (o_s < last))[:, None], b_dx, 0.0)
        p_tile = p_dx + ((start + o_s).to(tl.int64) * (H * D))[:, None] + o_c
        m_tile = ((o_s >= 0) & (o_s < length))[:, None]
        tl.store(p_tile, b_dx.to(p_dx.dtype.element_ty), mask=m_tile & m_d)


@triton.jit
def to_lagged(
    p_x, p_tail, p_du, p_offsets, p_lead, p_last, p_first, p_owner, p_dv, count, chunks, shares,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """A share of the gradient of one V_i: of every `shares`-th chunk, TILES BT tokens each."""
    i_p, i, i_h = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    o_d, o_f = tl.program_id(2) * BD + tl.arange(0, BD), tl.arange(0, BF)
    m_f = (o_f < F)[None, :]
    b_dv = tl.zeros([BD, BF], tl.float32)
    for i_c in range(i_p, chunks, shares):
        # A chunk that does not exist lies behind the last sequence and has no tile.
        i_n = tl.minimum(tl.load(p_owner + i_c), count - 1)
        start, length, lead, last = bounds(p_offsets, p_lead, p_last, i_n)
        chunk_first = (i_c - tl.load(p_first + i_n)) * (TILES * BT)
        tiles = tl.minimum(tl.cdiv(length - chunk_first, BT), TILES)
        for i_t in range(tiles):
            first = chunk_first + i_t * BT
            b_x = places(p_x, p_tail, start, lead, last, first - i, i_n, i_h, o_d, H, D, K, BT, UP)
            p_tile, m_tile = columns(p_du, start, length, first, i_h, o_f, H, F, BT)
            b_du = operand(tl.load(p_tile, mask=m_tile & m_f, other=0.0), UP)
            b_dv = tl.dot(tl.trans(b_x), b_du, b_dv, input_precision="ieee")
    o_out = ((i_p * K + i) * H + i_h).to(tl.int64) * D + o_d
    p_out = p_dv + (o_out * F)[:, None] + o_f[None, :]
    tl.store(p_out, b_dv, mask=(o_d < D)[:, None] & m_f)
