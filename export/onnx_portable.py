"""The decoder on standard ONNX operators alone (opset 21), for engines without `com.microsoft`.

The recurrence runs in chunks of C = min(T, 64) tokens under `Scan`, so any T is linear and T = 1 is
one small chunk. With b the cumulative log decay inside a chunk, b_m its middle and b_C its last row
(`kernels/gla/reference.py`):

    n = tril((q e^{b - b_m}) (k e^{b_m - b})^T) v + (q e^b) S
    S' = diag(e^{b_C}) S + (k e^{b_C - b})^T v
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekit.export.onnx_graph import END, Kind
from edgekit.export.onnx_lolcats import LolcatsGraph
from edgekit.export.onnx_values import Value
from edgekit.export.states import IMAGE_MASK

__all__ = ["PortableGraph"]

HIDDEN = -1e9
CHUNK_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Gather": {"axis": 2},
    "Transpose": {"perm": [0, 1, 3, 2]},
}
# One chunk, each step as output, operator, inputs: q [B, S, G, C, F]; k, g [B, S, C, F];
# v [B, S, C, V]; state S [B, S, F, V]; `lower`, `visible` and `middle` see `Chunks.lower`.
CHUNK_STEPS = (
    ("b", "MatMul", "lower g"),
    ("anchor", "Gather", "b middle"),
    ("end", "Gather", "b last"),
    ("b_after", "Sub", "b anchor"),
    ("grow", "Exp", "b_after"),
    ("grow_q", "Unsqueeze", "grow axis"),
    ("q_anchored", "Mul", "q grow_q"),
    ("b_before", "Sub", "anchor b"),
    ("shrink", "Exp", "b_before"),
    ("k_anchored", "Mul", "k shrink"),
    ("k_turned", "Transpose", "k_anchored"),
    ("k_shared", "Unsqueeze", "k_turned axis"),
    ("pairs", "MatMul", "q_anchored k_shared"),
    ("weights", "Where", "visible pairs zero"),
    ("v_shared", "Unsqueeze", "v axis"),
    ("inside", "MatMul", "weights v_shared"),
    ("decay", "Exp", "b"),
    ("decay_q", "Unsqueeze", "decay axis"),
    ("q_decayed", "Mul", "q decay_q"),
    ("S_shared", "Unsqueeze", "S axis"),
    ("before", "MatMul", "q_decayed S_shared"),
    ("n", "Add", "inside before"),
    ("b_left", "Sub", "end b"),
    ("left", "Exp", "b_left"),
    ("k_left", "Mul", "k left"),
    ("k_columns", "Transpose", "k_left"),
    ("update", "MatMul", "k_columns v"),
    ("end_rows", "Transpose", "end"),
    ("end_decay", "Exp", "end_rows"),
    ("kept", "Mul", "S end_decay"),
    ("S_next", "Add", "kept update"),
)


class PortableGraph(LolcatsGraph):
    """`OnnxGraph` with operators of the standard only."""

    @property
    def shares_states(self) -> bool:
        """Whether every state may be bound to one buffer, as past and as present.

        Never here: a key-value cache is a concatenation.
        """
        return False

    def rms_norm(self, x: Value, name: str) -> Value:
        """See `Graph.rms_norm`."""
        return Value(self._norm(x.name, name))

    def head_norm(self, x: Value, name: str) -> Value:
        """See `Graph.head_norm`."""
        return Value(functools.partial(self._head_norm, x, name))

    def swiglu(self, gate: Value, up: Value) -> Value:
        """See `Graph.swiglu`."""
        name = gate.name.partition("/")[0].rpartition(".")[0] + ".swiglu"
        sigmoid = self.file.node("Sigmoid", [gate.name], f"{name}.sigmoid")
        active = self.file.node("Mul", [gate.name, sigmoid], f"{name}.silu")
        return Value(self.file.node("Mul", [active, up.name], name))

    def geglu(self, gate: Value, up: Value) -> Value:
        """See `Graph.geglu`."""
        name = gate.name.partition("/")[0].rpartition(".")[0] + ".geglu"
        active = self.file.node("Gelu", [gate.name], f"{name}.gelu", approximate="tanh")
        return Value(self.file.node("Mul", [active, up.name], name))

    def attention(self, q: Value, k: Value, v: Value, layer: int) -> Value:
        """See `Graph.attention`; the cache is a concatenation."""
        config, name = self.config, f"model.layers.{layer}.self_attn.attention"
        d, states, groups = config.cached_width(layer), config.num_kv_heads, config.groups
        if d > config.head_dim:
            q, k, v = self._marked(q, k, v, name)
        queries = self._head_major(q.name, config.num_heads, f"{name}.q")
        rows = self._reshape(queries, [0, states, -1, d], f"{name}.rows")
        keys = self._grow(k, layer, "key", f"{name}.k")
        values = self._grow(v, layer, "value", f"{name}.v")
        turned = self.file.node("Transpose", [keys], f"{name}.k_turned", perm=[0, 1, 3, 2])
        scale = self.file.constant(np.float32(config.logit_scale), f"{name}.scale")
        scaled = self.file.node("Mul", [rows, scale], f"{name}.scaled")
        scores = self.file.node("MatMul", [scaled, turned], f"{name}.scores")
        wide = self.file.constant([0, states, groups, -1])
        shape = self.file.node("Concat", [wide, self.total], f"{name}.shape", axis=0)
        scores = self.file.node("Reshape", [scores, shape], f"{name}.groups")
        bias = self._visible_bias(config.window(layer))
        scores = self.file.node("Add", [scores, bias], f"{name}.masked")
        weights = self.file.node("Softmax", [scores], f"{name}.softmax", axis=-1)
        flat = self.file.node(
            "Concat", [self.file.constant([0, states, -1]), self.total], f"{name}.flat", axis=0
        )
        weights = self.file.node("Reshape", [weights, flat], f"{name}.weights")
        y = self.file.node("MatMul", [weights, values], name)
        y = self._reshape(y, [0, config.num_heads, -1, d], f"{name}.heads")
        y = self.file.node("Transpose", [y], f"{name}.out", perm=[0, 2, 1, 3])
        y = self._reshape(y, [0, 0, config.num_heads * d], f"{name}.flatten")
        if d > config.head_dim:
            return Value(self.head_gate.narrowed(y, name))
        if config.sums_keys(layer):
            sums = self.state(layer, "spin")
            y = self.head_gate.gated_by_sums(y, q.name, k.name, sums, name)
        return Value(y)

    def _norm(self, x: str, name: str) -> str:
        weight = self.file.weight(f"{name}.weight", self.writer.array(f"{name}.weight"))
        node, constant = self.file.node, self.file.constant
        square = node("Pow", [x, constant(np.float32(2), "two")], f"{name}.square")
        last = constant([-1])
        mean = node("ReduceMean", [square, last], f"{name}.mean", keepdims=1)
        eps = constant(np.float32(self.config.rms_norm_eps), "rms_norm_eps")
        root = node("Sqrt", [node("Add", [mean, eps], f"{name}.plus_eps")], f"{name}.root")
        return node("Mul", [node("Div", [x, root], f"{name}.unit"), weight], name)

    def _head_norm(self, x: Value, name: str) -> str:
        heads = self._reshape(x.name, [0, 0, -1, self.config.head_dim], f"{name}.heads")
        return self._flatten_heads(self._norm(heads, name), f"{name}.flatten")

    def _head_major(self, x: str, heads: int, name: str) -> str:
        """`[B, T, heads * width]` to `[B, heads, T, width]`."""
        apart = self._reshape(x, [0, 0, heads, -1], f"{name}.heads")
        return self.file.node("Transpose", [apart], f"{name}.head_major", perm=[0, 2, 1, 3])

    def _grow(self, x: Value, layer: int, kind: Kind, name: str) -> str:
        new = self._head_major(x.name, self.config.num_kv_heads, name)
        past, present = self.state(layer, kind)
        return self.file.nodes("Concat", [past, new], f"{name}.cache", [present], axis=2)[0]

    def _convolve(self, x: str, taps: str, past: str, present: str, name: str) -> str:
        channels, _, size = self.file.shape(taps)
        padded = self.file.node("Concat", [past, x], f"{name}.padded", axis=2)
        bounds = [self.file.constant([n]) for n in (1 - size, END, 2)]
        self.file.nodes("Slice", [padded, *bounds], f"{name}.tail", [present])
        return self.file.node("Conv", [padded, taps], name, group=channels, kernel_shape=[size])

    def _project(self, channels: str, weight: str, name: str) -> str:
        rows = self.file.node("Transpose", [channels], f"{name}.rows", perm=[0, 1, 2, 4, 3])
        return self.file.node("MatMul", [rows, weight], name)

    def _log_sigmoid(self, minus_a: str, minus_bias: str, name: str) -> str:
        logits = self.file.node("Add", [minus_a, minus_bias], f"{name}.bias")
        softplus = self.file.node("Softplus", [logits], f"{name}.softplus")
        scale = np.float32(-1.0 / self.config.lawcat.gate_divisor)
        return self.file.node("Mul", [softplus, self.file.constant(scale, "gate_scale")], name)

    def _recurrence(
        self, q: str, k: str, v: str, g: str | None, sizes: tuple[int, int], layer: int, name: str
    ) -> str:
        (states, features), config = sizes, self.config
        columns, groups = config.value_columns, config.num_heads // states
        past, present = self.state(layer, "ssm")
        if g is None:
            g = self.file.node("Mul", [k, self.file.constant(np.float32(0), "zero")], f"{name}.g")
        chunked = [
            self._chunked(q, [states, groups, features], [1, 0, 3, 4, 2, 5], f"{name}.q"),
            self._chunked(k, [states, features], [1, 0, 3, 2, 4], f"{name}.k"),
            self._chunked(v, [states, columns], [1, 0, 3, 2, 4], f"{name}.v"),
            self._chunked(g, [states, features], [1, 0, 3, 2, 4], f"{name}.g"),
        ]
        _, pieces = self.file.nodes(
            "Scan", [past, *chunked], name, [present, "*"], num_scan_inputs=4, body=self._body(name)
        )  # [n, B, states, groups, C, columns]
        rows = self.file.node("Transpose", [pieces], f"{name}.out", perm=[1, 0, 4, 2, 3, 5])
        flat = self._reshape(rows, [0, -1, config.num_heads * columns], f"{name}.rows")
        bounds = [self.file.constant([0]), self.time, self.file.constant([1])]
        return self.file.node("Slice", [flat, *bounds], f"{name}.unpadded")

    def _chunked(self, x: str, widths: Sequence[int], order: Sequence[int], name: str) -> str:
        """`[B, T, widths]` padded to whole chunks and ordered `[n, B, heads.., C, width]`."""
        filled = self.file.node("Pad", [x, self.chunks.padding], f"{name}.padded")
        shape = [self.file.constant([0]), *self.chunks.shape, self.file.constant(list(widths))]
        wanted = self.file.node("Concat", shape, f"{name}.chunk_shape", axis=0)
        apart = self.file.node("Reshape", [filled, wanted], f"{name}.chunks")
        return self.file.node("Transpose", [apart], f"{name}.chunk_major", perm=list(order))

    def _body(self, name: str) -> onnx.GraphProto:
        """The chunk `CHUNK_STEPS` as a graph: S, q, k, v, g to S' and n."""
        visible, lower, middle = self.chunks.lower
        outer = {
            "visible": visible,
            "lower": lower,
            "middle": middle,
            "zero": self.file.constant(np.float32(0), "zero"),
            "last": self.file.constant([-1]),
            "axis": self.file.constant([2]),
        }

        def inner(value: str) -> str:
            return outer.get(value) or f"{name}.chunk/{value}"

        nodes = []
        for output, op, inputs in CHUNK_STEPS:
            attributes = CHUNK_ATTRIBUTES.get(op, {})
            names = [inner(value) for value in inputs.split()]
            nodes.append(helper.make_node(op, names, [inner(output)], inner(output), **attributes))
        ports = [
            helper.make_tensor_value_info(inner(value), TensorProto.FLOAT, None)
            for value in ("S", "q", "k", "v", "g", "S_next", "n")
        ]
        return helper.make_graph(nodes, f"{name}.chunk", ports[:5], ports[5:])

    @functools.cached_property
    def _biases(self) -> dict[int | None, str]:
        """Those that were made, by window."""
        return {}

    def _visible_bias(self, window: int | None) -> str:
        """0 where a query sees a key, else very negative: `[B, 1, 1, T, S]`.

        Not padding, and earlier within the window or of the same image; a padded query sees itself.
        """
        if window not in self._biases:
            self._biases[window] = self._bias(window)
        return self._biases[window]

    def _bias(self, window: int | None) -> str:
        node, constant = self.file.node, self.file.constant
        rows, columns = self._steps
        seen = node("LessOrEqual", [columns, rows], "bias.causal")
        if window is not None:
            oldest = node("Sub", [rows, constant([window - 1])], "bias.oldest")
            near = node("GreaterOrEqual", [columns, oldest], "bias.near")
            seen = node("And", [seen, near], "bias.window")
        if self.config.image_attention == "bidirectional":
            seen = node("Or", [seen, self._same_image], "bias.image")
        itself = node("Equal", [columns, rows], "bias.itself")
        present = node("Cast", [self._attention_mask], "bias.present", to=TensorProto.BOOL)
        present = node("Unsqueeze", [present, constant([1, 2, 3])], "bias.keys")
        seen = node("Or", [node("And", [seen, present], "bias.and"), itself], "bias.seen")
        values = [constant(np.float32(x), "bias.value") for x in (0, HIDDEN)]
        return node("Where", [seen, *values], "bias")

    @functools.cached_property
    def _steps(self) -> tuple[str, str]:
        """Columns of `attention_mask`: those of this call `[T, 1]`, and all `[S]`."""
        node, constant = self.file.node, self.file.constant
        one = constant(np.asarray(1, np.int64), "bias.step")
        end = self._reshape(self.total, [], "bias.end")
        start = node("Sub", [end, self._reshape(self.time, [], "bias.time")], "bias.start")
        zero = constant(np.asarray(0, np.int64), "bias.zero")
        columns = node("Range", [zero, end, one], "bias.columns")
        rows = node("Range", [start, end, one], "bias.range")
        return node("Unsqueeze", [rows, constant([1])], "bias.rows"), columns

    @functools.cached_property
    def _same_image(self) -> str:
        """Which keys are of the query's own image, bool `[B, 1, 1, T, S]`: no text between them."""
        node, constant = self.file.node, self.file.constant
        start = node("Neg", [self.time], "image.start")
        bounds = [start, constant([END]), constant([1])]
        image = node("Slice", [IMAGE_MASK, *bounds], "image.recent")
        one = constant(np.asarray(1, np.int64), "image.one")
        text = node("Sub", [one, image], "image.text")
        count = node("CumSum", [text, one], "image.count")
        number = node("Mul", [node("Add", [count, one], "image.next"), image], "image.number")
        past = node("Sub", [self.total, self.time], "image.past")
        zero = constant([0])
        pads = node("Concat", [zero, past, zero, zero], "image.pads", axis=0)
        keys = node("Pad", [number, pads], "image.keys")  # 0 for text
        queries = node("Unsqueeze", [number, constant([1, 2, 4])], "image.queries")
        keys = node("Unsqueeze", [keys, constant([1, 2, 3])], "image.key_row")
        alike = node("Equal", [queries, keys], "image.alike")
        none = constant(np.asarray(0, np.int64), "image.none")
        return node("And", [alike, node("Greater", [queries, none], "image.is")], "image.same")
