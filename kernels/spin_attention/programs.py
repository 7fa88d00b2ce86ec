"""Triton programs of attention with image mass; `README.md` beside them has the maths.

`attend` is flash attention with one sum more: a program holds BM rows and passes over the keys that
they see, BN at a time, with a top m, the sum of all weights, the sum of image keys' weights and the
outputs, all measured from m. The R query heads of a key head are rows of the same program, so that
keys are read once for all of them: row r is token r // R and head r % R of the group.

Which keys belong to an image, and which are tokens and not padding, are bits of words, WORD keys in
each, that `pack` writes: one number says of a block whether it has an image key, and which.

`merge` puts together what programs that had a part of the keys each have found.

Strides of q, k and v count rows of D elements, so that the compiler knows how they are aligned.
`OP` is the type of what enters matrix products; no result of one is ever transposed.
"""

import triton
import triton.language as tl

__all__ = ["attend", "merge", "pack"]

LOG2E = tl.constexpr(1.4426950408889634)
WORD = tl.constexpr(64)
# Sizes that grow with every token: programs are not compiled again for them.
CHANGING = (
    "time", "keys", "past", "window", "part",
    "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head",
)  # fmt: skip


@triton.jit(do_not_specialize=("keys",))
def pack(flags, mask, image, tokens, keys, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Words `[B, ceil(S / WORD)]` of flags `[B, S]`, a byte each; grid (blocks of ROWS words, B).

    `image`: those of `flags` that `mask` leaves. `tokens`, with `PADDED`: the mask.
    """
    words, i_b = tl.cdiv(keys, WORD), tl.program_id(1).to(tl.int64)
    o_w, o_bit = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WORD)
    o_n = o_w[:, None] * WORD + o_bit[None, :]
    b_bits = tl.full([1, WORD], 1, dtype=tl.int64) << o_bit[None, :].to(tl.int64)
    m_image = tl.load(flags + i_b * keys + o_n, mask=o_n < keys, other=0) != 0
    if PADDED:
        m_token = tl.load(mask + i_b * keys + o_n, mask=o_n < keys, other=0) != 0
        m_image = m_image & m_token
        b_tokens = tl.sum(tl.where(m_token, b_bits, 0), 1)
        tl.store(tokens + i_b * words + o_w, b_tokens, mask=o_w < words)
    b_image = tl.sum(tl.where(m_image, b_bits, 0), 1)
    tl.store(image + i_b * words + o_w, b_image, mask=o_w < words)


@triton.jit
def _marked(word, o_n):
    """Which of up to 64 keys a word marks; shifts of 32 bits take half the registers."""
    low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
    return ((tl.where(o_n < 32, low, high) >> (o_n % 32)) & 1) != 0


@triton.jit
def _rows(
    p_head, i_key, o_n, o_d, token, keys, D: tl.constexpr, BD: tl.constexpr, EDGE: tl.constexpr
):
    """A block of keys or of values, those from `i_key` on; 0 outside."""
    p_block = p_head + i_key.to(tl.int64) * token * D
    at = o_n[:, None] * (token * D) + o_d[None, :]
    if EDGE:
        mask = (o_n < keys - i_key)[:, None] & (o_d < D)[None, :]
        return tl.load(p_block + at, mask=mask, other=0.0)
    if BD > D:
        return tl.load(p_block + at, mask=(o_d < D)[None, :], other=0.0)
    return tl.load(p_block + at)


@triton.jit
def _over_blocks(
    b_o, b_top, b_sum, b_image, b_q, o_pos, p_k, p_v, p_image, p_tokens, first, end,
    keys, window, rate, k_token, v_token,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    WINDOW: tl.constexpr, PADDED: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Pass over the key blocks from `first` to `end`; without `EDGE` rows see all of their keys."""
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    for i in range(first, end):
        i_key = i * BN
        b_k = _rows(p_k, i_key, o_n, o_d, k_token, keys, D, BD, EDGE).to(OP)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if EDGE:
            m_s = (i_key + o_n)[None, :] <= o_pos[:, None]
            if WINDOW:
                m_s = m_s & ((i_key + o_n)[None, :] > o_pos[:, None] - window)
            b_s = tl.where(m_s, b_s, float("-inf"))
        if PADDED:
            word = tl.load(p_tokens + i_key // WORD) >> (i_key % WORD)
            b_s = tl.where(_marked(word, o_n)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        # A row that has seen nothing yet is measured from 0: -inf - -inf would be NaN.
        b_from = tl.where(b_new == float("-inf"), 0.0, b_new) * rate
        b_p = tl.exp2(b_s * rate - b_from[:, None])
        b_shrink = tl.exp2(b_top * rate - b_from)
        b_top = b_new
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_image = b_image * b_shrink
        word = tl.load(p_image + i_key // WORD) >> (i_key % WORD)
        if word != 0:
            b_image += tl.sum(tl.where(_marked(word, o_n)[None, :], b_p, 0.0), 1)
        b_v = _rows(p_v, i_key, o_n, o_d, v_token, keys, D, BD, EDGE).to(OP)
        b_o = tl.dot(b_p.to(OP), b_v, b_o * b_shrink[:, None], input_precision="ieee")
    return b_o, b_top, b_sum, b_image


@triton.jit(do_not_specialize=CHANGING)
def attend(
    q, k, v, image, tokens, o, mass, total, scale,
    time, keys, past, window, part,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Output and mass of BM rows; grid (blocks of rows, B G, parts of `part` blocks of keys).

    With `PARTS` they are those of a part alone, `[parts, B, T, H, ..]`, and `total` is the log to
    base 2 of the part's sum of weights.
    """
    i_block = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # rows that see most keys first
    i_b, i_g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    o_d, o_r = tl.arange(0, BD), i_block + tl.arange(0, BM)
    o_t, o_h, m_r = o_r // R, i_g * R + o_r % R, o_r < time * R
    m_q = m_r[:, None] & (o_d < D)[None, :]
    p_q = q + i_b * q_batch * D + (o_t.to(tl.int64) * q_token + o_h * q_head)[:, None] * D
    b_q = tl.load(p_q + o_d[None, :], mask=m_q, other=0.0).to(OP)
    p_k = k + (i_b * k_batch + i_g.to(tl.int64) * k_head) * D
    p_v = v + (i_b * v_batch + i_g.to(tl.int64) * v_head) * D
    words = tl.cdiv(keys, WORD)
    p_image, p_tokens = image + i_b * words, tokens + i_b * words

    i_first = past + i_block // R  # positions of the first and the last row
    i_last = past + tl.minimum((i_block + BM - 1) // R, time - 1)
    begin = tl.program_id(2) * part
    end = tl.minimum(begin + part, tl.cdiv(i_last + 1, BN))
    whole_from, whole_to = begin, (i_first + 1) // BN  # blocks that every row sees as a whole
    if WINDOW:
        begin = tl.maximum(begin, tl.maximum(i_first - window + 1, 0) // BN)
        whole_from = tl.maximum(begin, tl.cdiv(tl.maximum(i_last - window + 1, 0), BN))
    whole_from, whole_to = tl.minimum(whole_from, end), tl.minimum(whole_to, end)

    rate, o_pos = scale * LOG2E, past + o_t
    b_o = tl.zeros([BM, BD], dtype=tl.float32)
    b_top = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_image = tl.zeros([BM], dtype=tl.float32)
    if WINDOW:
        b_o, b_top, b_sum, b_image = _over_blocks(
            b_o, b_top, b_sum, b_image, b_q, o_pos, p_k, p_v, p_image, p_tokens,
            begin, whole_from, keys, window, rate, k_token, v_token,
            D, BD, BN, True, WINDOW, PADDED, OP,
        )  # fmt: skip
    b_o, b_top, b_sum, b_image = _over_blocks(
        b_o, b_top, b_sum, b_image, b_q, o_pos, p_k, p_v, p_image, p_tokens,
        whole_from, whole_to, keys, window, rate, k_token, v_token,
        D, BD, BN, False, WINDOW, PADDED, OP,
    )  # fmt: skip
    b_o, b_top, b_sum, b_image = _over_blocks(
        b_o, b_top, b_sum, b_image, b_q, o_pos, p_k, p_v, p_image, p_tokens,
        tl.maximum(whole_from, whole_to), end, keys, window, rate, k_token, v_token,
        D, BD, BN, True, WINDOW, PADDED, OP,
    )  # fmt: skip

    b_divisor = tl.where(b_sum == 0, 1.0, b_sum)
    i_row = (tl.program_id(2) * (tl.num_programs(1) // G) + i_b) * time + o_t
    i_row = i_row * (G * R) + o_h
    p_o = o + i_row[:, None] * D + o_d[None, :]
    tl.store(p_o, (b_o / b_divisor[:, None]).to(o.dtype.element_ty), mask=m_q)
    tl.store(mass + i_row, b_image / b_divisor, mask=m_r)
    if PARTS:
        b_log = tl.where(b_sum == 0, float("-inf"), b_top * rate + tl.log2(b_divisor))
        tl.store(total + i_row, b_log, mask=m_r)


@triton.jit(do_not_specialize=("rows", "parts"))
def merge(
    o_parts, mass_parts, total, o, mass, rows, parts,
    D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Output and mass of one row from those of its parts, each by its weight; grid (rows,)."""
    i_row = tl.program_id(0).to(tl.int64)
    o_p, o_d = tl.arange(0, BP), tl.arange(0, BD)
    m_p = o_p < parts
    i_part = o_p.to(tl.int64) * rows + i_row
    b_total = tl.load(total + i_part, mask=m_p, other=float("-inf"))
    top = tl.max(b_total, 0)
    b_weight = tl.exp2(b_total - tl.where(top == float("-inf"), 0.0, top))
    all_parts = tl.sum(b_weight, 0)
    b_weight = b_weight / tl.where(all_parts == 0, 1.0, all_parts)
    b_mass = tl.load(mass_parts + i_part, mask=m_p, other=0.0)
    tl.store(mass + i_row, tl.sum(b_weight * b_mass, 0))
    m_o = m_p[:, None] & (o_d < D)[None, :]
    b_o = tl.load(o_parts + i_part[:, None] * D + o_d[None, :], mask=m_o, other=0.0)
    b_o = tl.sum(b_weight[:, None] * b_o, 0)
    tl.store(o + i_row * D + o_d, b_o.to(o.dtype.element_ty), mask=o_d < D)
