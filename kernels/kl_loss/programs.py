"""Triton programs of the vocabulary's losses; `README.md` beside them has the maths.

`loss_rows` is one program for each position: a first sweep over the vocabulary keeps running sums
in every lane and writes the losses; a second one, over a row that the cache still holds, writes the
gradients over the logits. `combine` scales them once their weights are known.

    logits    the student's, `[R, V]`; afterwards d ce / d s            CE, GRADIENTS
    expected  the teacher's, `[R, V]`; afterwards d kl / d s            KL, GRADIENTS

Sums are to base 2: exp(x) = 2^(x log2 e). Lanes beyond the vocabulary read FLOOR, which is finite,
so that no difference is inf - inf; what they sum vanishes when lanes are added up.
"""

import triton
import triton.language as tl

__all__ = ["combine", "loss_rows"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1.0e30)


@triton.jit
def _block(p_row, o_v, V: tl.constexpr):
    m_v = o_v < V
    return tl.where(m_v, tl.load(p_row + o_v, mask=m_v, other=0.0).to(tl.float32), FLOOR)


@triton.jit
def _weights(b_top, b_x, rate):
    """What the sums so far, and the new term, are multiplied with as the largest x changes.

    Of 2^(top - new top) and 2^(x - new top) one is 1: a single power gives both.
    """
    b_over = b_x - b_top
    b_power = tl.exp2(-tl.abs(b_over) * rate)
    rises = b_over > 0
    return tl.where(rises, b_power, 1.0), tl.where(rises, 1.0, b_power)


@triton.jit
def _total(b_sum, b_top, top, rate):
    """All lanes' sums, each of which is measured from its own top."""
    return tl.sum(b_sum * tl.exp2((b_top - top) * rate), 0)


@triton.jit
def loss_rows(
    logits, expected, targets, ce, kl, temperature,
    V: tl.constexpr, IGNORE: tl.constexpr, CE: tl.constexpr, KL: tl.constexpr,
    APART: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of one row, and their gradients over its logits; grid (R,).

    `APART`: the cross-entropy, which knows no temperature, needs a sum of its own.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_s, p_t = logits + i_row * V, expected + i_row * V
    rate = LOG2E / temperature
    if CE:
        i_target = tl.load(targets + i_row)
        inside = (i_target >= 0) & (i_target < V)
        target = i_target.to(tl.int32)
        # Read before any lane may write there: the sums below wait for all of them.
        chosen = tl.load(p_s + target, mask=inside, other=float("nan")).to(tl.float32)

    b_top = tl.full([BLOCK], FLOOR, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    b_own = tl.zeros([BLOCK], dtype=tl.float32)
    b_top_t = tl.full([BLOCK], FLOOR, dtype=tl.float32)
    b_sum_t = tl.zeros([BLOCK], dtype=tl.float32)
    b_gap = tl.zeros([BLOCK], dtype=tl.float32)  # A of README.md, times the temperature
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_s = _block(p_s, o_v, V)
        b_old, b_new = _weights(b_top, b_s, rate)
        b_sum = b_sum * b_old + b_new
        if APART:
            b_old, b_new = _weights(b_top, b_s, LOG2E)
            b_own = b_own * b_old + b_new
        b_top = tl.maximum(b_top, b_s)
        if KL:
            b_t = _block(p_t, o_v, V)
            b_old, b_new = _weights(b_top_t, b_t, rate)
            b_sum_t = b_sum_t * b_old + b_new
            b_gap = b_gap * b_old + b_new * (b_t - b_s)
            b_top_t = tl.maximum(b_top_t, b_t)

    top = tl.max(b_top, 0)
    log_sum = tl.log2(_total(b_sum, b_top, top, rate))
    if CE:
        log_own = log_sum
        if APART:
            log_own = tl.log2(_total(b_own, b_top, top, LOG2E))
        kept = target != IGNORE
        tl.store(ce + i_row, tl.where(kept, top - chosen + LN2 * log_own, 0.0))
    if KL:
        top_t = tl.max(b_top_t, 0)
        sum_t = _total(b_sum_t, b_top_t, top_t, rate)
        log_sum_t = tl.log2(sum_t)
        gap = _total(b_gap, b_top_t, top_t, rate) / sum_t + (top - top_t)
        loss = gap / temperature + LN2 * (log_sum - log_sum_t)
        tl.store(kl + i_row, loss * temperature * temperature)

    if GRADIENTS:
        for start in range(0, V, BLOCK):
            o_v = start + tl.arange(0, BLOCK)
            m_v = o_v < V
            b_s = _block(p_s, o_v, V)
            b_p = tl.exp2((b_s - top) * rate - log_sum)
            if KL:
                b_q = tl.exp2((_block(p_t, o_v, V) - top_t) * rate - log_sum_t)
                b_by = (b_p - b_q) * temperature
                tl.store(p_t + o_v, b_by.to(expected.dtype.element_ty), mask=m_v)
            if CE:
                if APART:
                    b_p = tl.exp2((b_s - top) * LOG2E - log_own)
                b_by = tl.where(kept, b_p - tl.where(o_v == target, 1.0, 0.0), 0.0)
                tl.store(p_s + o_v, b_by.to(logits.dtype.element_ty), mask=m_v)


@triton.jit
def combine(
    grads, by_ce, by_kl, result, size, CE: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradients that the losses hand back, each times its own, rounded once; grid (blocks,).

    `grads [CE + KL, size]`: of the cross-entropy first; `by_ce`, `by_kl` and `result [size]`.
    """
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < size
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    p_next = grads
    if CE:
        b_sum += tl.load(by_ce) * tl.load(p_next + o_i, mask=m_i, other=0.0).to(tl.float32)
        p_next += size
    if KL:
        b_sum += tl.load(by_kl) * tl.load(p_next + o_i, mask=m_i, other=0.0).to(tl.float32)
    tl.store(result + o_i, b_sum.to(result.dtype.element_ty), mask=m_i)
