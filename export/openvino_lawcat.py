"""Normalised gated linear attention as OpenVINO nodes, chunk-parallel for any T, one included.

With b the cumulative decay inside a chunk, m its value at the middle row and l at the last:

    q' = q e^(b - m)      k' = k e^(m - b)      P = tril(q' k'^T)      D = e^(l - m) (k'^T v+)
    S_(n+1) = e^l S_n + D_n                     o_n = P v+ + q' (e^m S_n)

Everything runs over all chunks at once except the recurrence over n, a `Loop` of two products. |g|
<= 2.5 and C <= 64 keep every factor below e^80 (the identity is `kernels/gla/reference.py`'s). An
`If` with a leaner branch for T = 1 would save about 50 us a layer, but in OpenVINO 2026.4 the CPU
plug-in lets a branch's tensors share memory with the outer graph's, and the first call at each new
T is silently wrong.

B batch, S state heads, G query heads per state head, N chunks of C tokens, F features, V value
columns (values, the normaliser, zeros).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from edgekit.export.openvino_spin import HeadGate
from edgekit.export.openvino_values import ints, named, scalar, sliced
from edgekit.models.config import DecoderConfig
from edgekit.runtime.ov_shapes import CHUNK

__all__ = ["Chunking", "chunk_count", "gated_attention", "lower_triangle", "scan"]

Handle = Any  # an openvino.Output: the package ships no types


def chunk_count(length: Handle) -> Handle:
    """N = ceil(T / 64) for a length `[1]`; C = ceil(T / N) then wastes fewer than N tokens."""
    return op.divide(op.add(length, ints([CHUNK - 1])), ints([CHUNK])).output(0)


@dataclass(frozen=True, slots=True)
class Chunking:
    """What every layer of a call shares; made once, since each node costs its share of a step."""

    causal: Handle  # [C, C] boolean
    triangle: Handle  # [C, C] fp32
    middle: Handle  # [1]
    last: Handle  # [1]
    tail: Handle  # the normaliser's ones, SPIN's indicator and the padding, [B, S, T, V - d]
    key_shape: Handle  # reshape patterns: [B, S, N, C, .]
    query_shape: Handle  # [B, S, G, N, C, F]
    output_shape: Handle  # [B, H, T, V]

    @classmethod
    def of(
        cls, batch: Handle, time: Handle, config: DecoderConfig, image: Handle | None = None
    ) -> "Chunking":
        """The chunking of `time [1]` padded tokens (a multiple of their chunks) of `batch [1]`.

        `image` is SPIN's indicator, fp32 `[B, T]`, or None.
        """
        s, columns = config.state_heads, config.value_columns
        count = chunk_count(time)
        size = op.divide(time, count)
        causal = lower_triangle(size)
        ones = np.zeros((1, 1, 1, columns - config.head_dim), np.float32)
        ones[..., 0] = 1.0
        tail_shape = op.concat([batch, ints([s]), time, ints([ones.shape[-1]])], 0)
        groups, rows = config.num_heads // s, config.state_rows
        return cls(
            causal=causal,
            triangle=op.convert(causal, "f32").output(0),
            middle=op.divide(size, ints([2])).output(0),
            last=op.subtract(size, ints([1])).output(0),
            tail=_tail(op.broadcast(op.constant(ones), tail_shape), image),
            key_shape=op.concat([ints([0, s]), count, size, ints([-1])], 0).output(0),
            query_shape=op.concat([ints([0, s, groups]), count, size, ints([rows])], 0).output(0),
            output_shape=op.concat([ints([0, config.num_heads]), time, ints([columns])], 0).output(
                0
            ),
        )


def gated_attention(
    q: Handle,
    k: Handle,
    v: Handle,
    g: Handle,
    past: Handle,
    chunking: Chunking,
    config: DecoderConfig,
    gate: HeadGate | None = None,
    *,
    name: str,
) -> tuple[Handle, Handle]:
    """Add the recurrence to the graph.

    Args:
        q: features `[B, H, T, F]`.
        k: features `[B, S, T, F]`, zero on padding.
        v: values `[B, S, T, d]`.
        g: log decay `[B, S, T, F]`, zero on padding.
        past: state `[B, S, F, V]`.
        chunking: how T is cut.
        config: sizes and eps.
        gate: SPIN's, if it turns down heads of this layer.
        name: what the runtime calls the recurrence's ends by, `{name}.q` to `{name}.y`, where it
            puts the form of one token in its place (`runtime/ov_step.py`).

    Returns:
        The output `[B, T, H * d]`, normalised or scaled, and the state after the call.
    """
    values = op.concat([v, chunking.tail], 3)
    kc, vc, gc = (
        named(op.reshape(x, chunking.key_shape, True), f"{name}.{part}")
        for part, x in (("k", k), ("v", values), ("g", g))
    )
    b = op.matmul(chunking.triangle, gc, False, False)
    middle, last = (op.gather(b, row, ints(3)) for row in (chunking.middle, chunking.last))
    split = op.reshape(q, chunking.query_shape, True)
    split.set_friendly_name(f"{name}.q")
    qc = _swap_groups(split)  # [B, S, N, G, C, F]
    qc = op.multiply(qc, op.unsqueeze(op.exp(op.subtract(b, middle)), ints([3])))
    kc = op.multiply(kc, op.exp(op.subtract(middle, b)))
    pairs = op.matmul(qc, op.unsqueeze(kc, ints([3])), False, True)
    weights = op.select(chunking.causal, pairs, scalar(0.0))
    within = op.matmul(weights, op.unsqueeze(vc, ints([3])), False, False)
    shrink = _column(op.exp(op.subtract(last, middle)), config)
    added = op.multiply(shrink, op.matmul(kc, vc, True, False))  # [B, S, N, F, V]
    entering, after = scan(added.output(0), past, _column(op.exp(last), config))
    anchored = op.unsqueeze(op.multiply(_column(op.exp(middle), config), entering), ints([3]))
    y = _swap_groups(op.add(within, op.matmul(qc, anchored, False, False)))
    joined = op.reshape(y, chunking.output_shape, True)
    joined.set_friendly_name(f"{name}.y")
    return _finished(joined, config, gate), after


def _tail(ones: ov.Node, image: Handle | None) -> Handle:
    """The columns after the values, `[B, S, T, V - d]`, with the indicator in the second."""
    if image is None:
        return ones.output(0)
    second = np.zeros((1, 1, 1, int(ones.get_output_partial_shape(0)[3].get_length())), np.float32)
    second[..., 1] = 1.0
    indicator = op.multiply(op.unsqueeze(image, ints([1, 3])), op.constant(second))
    return op.add(ones, indicator).output(0)


def _swap_groups(x: ov.Node) -> ov.Node:
    """`[B, S, G, N, C, .]` to `[B, S, N, G, C, .]`, or back."""
    return op.transpose(x, ints([0, 1, 3, 2, 4, 5]))


def _column(x: ov.Node, config: DecoderConfig) -> Handle:
    """`[B, S, N, 1, F]` to `[B, S, N, F, 1]`."""
    return op.reshape(x, ints([0, 0, 0, config.state_rows, 1]), True).output(0)


def _finished(x: ov.Node, config: DecoderConfig, gate: HeadGate | None) -> Handle:
    """`[B, H, T, V]` divided by its normaliser column, or scaled, as `[B, T, H * d]`."""
    d, column = config.head_dim, x.output(0)
    y = sliced(column, ints([0]), ints([d]), 3)
    if config.lawcat.normaliser:
        denominator = sliced(column, ints([d]), ints([d + 1]), 3)
        denominator = op.add(denominator, scalar(config.lawcat.eps))
        y = op.divide(y, denominator).output(0)
        if gate is not None:
            mass = op.divide(sliced(column, ints([d + 1]), ints([d + 2]), 3), denominator)
            y = gate.gated(y, mass.output(0))
    else:
        y = op.multiply(y, scalar(config.state_rows**-0.5)).output(0)
    return op.reshape(op.transpose(y, ints([0, 2, 1, 3])), ints([0, 0, -1]), True).output(0)


def lower_triangle(size: ov.Node) -> Handle:
    """Boolean `[C, C]` for a size `[1]`."""
    steps = op.range(ints(0), op.squeeze(size, ints([0])), ints(1), "i64")
    return op.less_equal(op.unsqueeze(steps, ints([0])), op.unsqueeze(steps, ints([1]))).output(0)


def scan(added: Handle, past: Handle, decay: Handle | None = None) -> tuple[Handle, Handle]:
    """States that enter each chunk `[B, S, N, F, V]` and the state after the last `[B, S, F, V]`.

    Args:
        added: what each chunk adds, `[B, S, N, F, V]`.
        past: the state before the first chunk, `[B, S, F, V]`.
        decay: what each chunk multiplies the state by, `[B, S, N, F, 1]`; None: nothing.
    """
    s, f, columns = (int(n.get_length()) for n in list(past.get_partial_shape())[1:])
    state, delta, scale = (
        ov.op.Parameter(ov.Type.f32, ov.PartialShape([-1, s, 1, f, width]))
        for width in (columns, columns, 1)
    )
    kept = state if decay is None else op.multiply(scale, state)
    keep_going = op.constant(np.array(True))
    results = [op.result(op.add(kept, delta)), op.result(state), op.result(keep_going)]
    body = ov.Model(results, [state, delta] if decay is None else [state, delta, scale])
    count = op.gather(op.shape_of(added), ints(2), ints(0))
    loop = op.loop(count, op.constant(np.array(True)))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 2])
    following, entering, _ = body.get_results()
    loop.set_merged_input(state, op.unsqueeze(past, ints([2])).output(0), following.output(0))
    loop.set_sliced_input(delta, added, 0, 1, 1, -1, 2)
    if decay is not None:
        loop.set_sliced_input(scale, decay, 0, 1, 1, -1, 2)
    after = loop.get_iter_value(following.output(0), -1)
    states = loop.get_concatenated_slices(entering.output(0), 0, 1, 1, -1, 2)
    return states, op.squeeze(after, ints([2])).output(0)
