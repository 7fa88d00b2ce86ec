"""Triton programs of the stage-1 loss: a program reads some positions, each with W values.

The forward reads both tensors once and writes one fp32 sum per program; the backward reads them
again, which costs as much as reading back a stored difference and keeps no memory.

Letters: W values of a position; BR positions and BW values of a tile, powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def difference(p_y, p_expected, p_mask, rows, o_r, o_w, W: tl.constexpr):
    """Pointer offsets of a tile, which of them exist, and y - expected, fp32, 0 at padding."""
    o_tile = o_r.to(tl.int64)[:, None] * W + o_w[None, :]
    m_tile = (o_r < rows)[:, None] & (o_w < W)[None, :]
    m_read = m_tile
    if p_mask is not None:
        b_valid = tl.load(p_mask + o_r, mask=o_r < rows, other=0)
        m_read = m_tile & (b_valid != 0)[:, None]
    b_y = tl.load(p_y + o_tile, mask=m_read, other=0.0).to(tl.float32)
    b_expected = tl.load(p_expected + o_tile, mask=m_read, other=0.0).to(tl.float32)
    return o_tile, m_tile, b_y - b_expected


@triton.jit
def forward(
    p_y, p_expected, p_mask, p_sums, rows, W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """The sum of squares of BR positions."""
    i_r = tl.program_id(0)
    o_r = i_r * BR + tl.arange(0, BR)
    b_squares = tl.zeros([BR, BW], tl.float32)
    for first in range(0, W, BW):
        o_w = first + tl.arange(0, BW)
        _, _, b_error = difference(p_y, p_expected, p_mask, rows, o_r, o_w, W)
        b_squares += b_error * b_error
    tl.store(p_sums + i_r, tl.sum(b_squares))


@triton.jit
def backward(
    p_y, p_expected, p_mask, p_upstream, p_dy, rows,
    W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile: twice the difference times what arrives."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)
    o_tile, m_tile, b_error = difference(p_y, p_expected, p_mask, rows, o_r, o_w, W)
    b_dy = 2.0 * tl.load(p_upstream).to(tl.float32) * b_error
    tl.store(p_dy + o_tile, b_dy.to(p_dy.dtype.element_ty), mask=m_tile)
