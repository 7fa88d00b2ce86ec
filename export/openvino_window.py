"""LoLCATs' attention as OpenVINO nodes: linear in T, one token included.

`kernels/window/reference.py` has the maths. Time is padded to N chunks of C tokens; a chunk sees
its own band of w + C columns of the history, and the sum of everything that had left the window
before it. B batch, S KV heads, G query heads per KV head, H = S G, V value columns (values, then
the mass and copies of it).
"""

from dataclasses import dataclass
from typing import Any

import openvino as ov
from openvino import opset15 as op

from edgekit.export.openvino_lawcat import chunk_count, lower_triangle, scan
from edgekit.export.openvino_values import ints, scalar, sliced, squeezed
from edgekit.models.config import DecoderConfig

__all__ = ["Bands", "LinearPart", "window_attention"]

Handle = Any  # an openvino.Output: the package ships no types
HIDDEN = -1e30


@dataclass(frozen=True, slots=True)
class Bands:
    """What every layer of a call shares.

    Attributes:
        causal: `[C, C]`, boolean.
        band: the columns t < j <= t + w of row t, `[C, C + w]`, boolean.
        columns: of each chunk's band, `[N, C + w]`.
        query_shape: reshape pattern `[B, N, C, S, G, d]` of `[B, T, H d]`.
        chunk_shape: reshape pattern `[B, S, G, N, C, .]` of `[B, H, T, .]`.
        scan_shape: reshape pattern `[B, H, N, F, V]` of `[B, S, G, N, F, V]`.
    """

    causal: Handle
    band: Handle
    columns: Handle
    query_shape: Handle
    chunk_shape: Handle
    scan_shape: Handle

    @classmethod
    def of(cls, time: Handle, config: DecoderConfig) -> "Bands":
        """The bands of `time [1]` padded tokens, a multiple of their chunks."""
        window, count = config.lolcats.window, chunk_count(time)
        size = op.divide(time, count)
        rows = op.unsqueeze(_range(size), ints([1]))
        wide = _range(op.add(size, ints([window])))
        band = op.logical_and(
            op.greater(wide, rows), op.less_equal(wide, op.add(rows, ints(window)))
        )
        starts = op.multiply(_range(count), size)
        heads = ints([config.num_kv_heads, config.groups])
        chunks = op.concat([count, size], 0)
        return cls(
            causal=lower_triangle(size),
            band=band.output(0),
            columns=op.add(op.unsqueeze(starts, ints([1])), wide).output(0),
            query_shape=op.concat([ints([0]), chunks, heads, ints([-1])], 0).output(0),
            chunk_shape=op.concat([ints([0]), heads, chunks, ints([-1])], 0).output(0),
            scan_shape=op.concat(
                [ints([0, config.num_heads]), count, ints([-1, config.value_columns])], 0
            ).output(0),
        )


@dataclass(frozen=True, slots=True)
class LinearPart:
    """The linear attention: features `[B, H, T, F]` and what its keys lead to.

    Attributes:
        phi_q: features of the queries.
        phi_k: features of the keys that leave the window with each query.
        values: value columns of those keys, `[B, H, T, V]`; 0 where there is no token.
        past: state `[B, H, F, V]`.
    """

    phi_q: Handle
    phi_k: Handle
    values: Handle
    past: Handle


def window_attention(
    q: Handle,
    history: Handle,
    log_gamma: Handle,
    linear: LinearPart,
    bands: Bands,
    config: DecoderConfig,
) -> tuple[Handle, Handle]:
    """Add the attention to the graph.

    Args:
        q: rotated queries `[B, T, H d]`.
        history: keys, values and whether there is a token, of the window and then of the call,
            `[B, w + T, 2 S d + 1]`.
        log_gamma: log weight of the window, `[S, G, 1, 1, 1]`.
        linear: what the linear part reads.
        bands: how T is cut.
        config: sizes and eps.

    Returns:
        The output `[B, T, H d]` and the linear state after the call.
    """
    older, after = _older(linear, bands, config)
    d, width = config.head_dim, config.num_kv_heads * config.head_dim
    around = op.gather(history, bands.columns, ints(1))  # [B, N, C + w, 2 S d + 1]
    k, v, seen = op.variadic_split(around, ints(3), ints([width, width, 1])).outputs()
    k, v = (_heads(x, config) for x in (k, v))  # [B, S, 1, N, C + w, d]
    queries = op.transpose(op.reshape(q, bands.query_shape, True), ints([0, 3, 4, 1, 2, 5]))
    scores = op.matmul(op.multiply(queries, scalar(config.logit_scale)), k, False, True)
    tokens = op.greater(op.transpose(seen, ints([0, 1, 3, 2])), scalar(0.5))  # [B, N, 1, C + w]
    visible = op.logical_and(op.unsqueeze(tokens, ints([1, 2])), bands.band)
    logits = op.select(visible, scores, scalar(HIDDEN))
    if not config.lolcats.common_scale:
        logits = op.subtract(logits, op.reduce_max(logits, ints([-1]), True))
    y = _joined(op.add(logits, log_gamma), v, older, config)
    y = op.transpose(y, ints([0, 3, 4, 1, 2, 5]))  # [B, N, C, S, G, d]
    return op.reshape(y, ints([0, -1, config.num_heads * d]), True).output(0), after


def _older(linear: LinearPart, bands: Bands, config: DecoderConfig) -> tuple[Handle, Handle]:
    """phi(q)^T S after each token, `[B, S, G, N, C, V]`, and the state after the call."""
    phi_q, phi_k, v = (
        op.reshape(x, bands.chunk_shape, True) for x in (linear.phi_q, linear.phi_k, linear.values)
    )
    added = op.matmul(phi_k, v, True, False)  # [B, S, G, N, F, V]
    per_head = op.reshape(added, bands.scan_shape, True).output(0)
    entering, after = scan(per_head, linear.past)
    pairs = op.select(bands.causal, op.matmul(phi_q, phi_k, False, True), scalar(0.0))
    grouped = op.reshape(entering, op.shape_of(added), False)
    before = op.matmul(phi_q, grouped, False, False)
    return op.add(op.matmul(pairs, v, False, False), before).output(0), after


def _heads(x: Handle, config: DecoderConfig) -> ov.Node:
    """`[B, N, C + w, S d]` to `[B, S, 1, N, C + w, d]`."""
    d = config.head_dim
    apart = op.reshape(x, ints([0, 0, 0, config.num_kv_heads, d]), True)
    return op.unsqueeze(op.transpose(apart, ints([0, 3, 1, 2, 4])), ints([2]))


def _joined(logits: ov.Node, v: ov.Node, older: Handle, config: DecoderConfig) -> ov.Node:
    """The log mass of the linear part as one more logit, its mean as one more value."""
    d, eps = config.head_dim, scalar(config.lolcats.eps)
    total, mass = (
        sliced(older, ints([start]), ints([end]), 5) for start, end in ((0, d), (d, d + 1))
    )
    mass = op.add(mass, eps)
    weights = op.softmax(op.concat([logits, op.log(mass)], 5), 5)
    near, far = sliced(weights, ints([0]), ints([-1]), 5), sliced(weights, ints([-1]), None, 5)
    mean = op.divide(total, mass)
    return op.add(op.matmul(near, v, False, False), op.multiply(far, mean))


def _range(length: Handle) -> Handle:
    """0 up to a length `[1]`."""
    return op.range(ints(0), squeezed(length), ints(1), "i64").output(0)
