"""The decoder on ONNX Runtime's fused operators (`com.microsoft`): one graph for every call.

S <- diag(exp g) S + k v^T, o = q^T S is `LinearAttention`; its state and the convolution's may be
bound to the same buffer as input and output. Key-value states may too, at any size that holds the
sequence. `GroupQueryAttention` takes any number of tokens of one sequence, but several tokens of
several sequences only in the first call: later ones must come one at a time. Being causal, it
cannot let an image's tokens see each other: that is left to the portable operators.
"""

import functools

import numpy as np
import torch
from onnx import TensorProto

from edgekit.export.onnx_file import CONTRIB
from edgekit.export.onnx_portable import PortableGraph
from edgekit.export.onnx_values import Part, Rotated, Sum, Value
from edgekit.models.rope import rope_tables

__all__ = ["ContribGraph"]

ROTARY_UNIT = 16  # the operator rotates heads of a multiple of this width only, by one position
HIDDEN = -1e9  # attention bias of padding; finite, so that a row of padding stays a number


class ContribGraph(PortableGraph):
    """`PortableGraph` with contrib operators in the place of most others."""

    @property
    def shares_states(self) -> bool:
        """See `PortableGraph.shares_states`; here they may, unless attention is not causal."""
        return self.config.image_attention == "causal" or "softmax" not in self.config.mixers

    def rms_norm(self, x: Value, name: str) -> Value:
        """See `Graph.rms_norm`; takes a pending residual sum over."""
        weight = self.file.weight(f"{name}.weight", self.writer.array(f"{name}.weight"))
        eps = self.config.rms_norm_eps
        if not (isinstance(x, Sum) and x.pending):
            return Value(self._fused_norm(x.name, weight, name))
        normed, _, _, total = self.file.nodes(
            f"{CONTRIB}.SkipSimplifiedLayerNormalization",
            [x.x.name, x.y.name, weight],
            name,
            ["*", "", "", f"{name}/residual"],
            epsilon=eps,
        )
        x.settle(total)
        return Value(normed)

    def head_norm(self, x: Value, name: str) -> Value:
        """See `Graph.head_norm`."""
        return Value(functools.partial(self._head_norm, x, name))

    def swiglu(self, gate: Value, up: Value) -> Value:
        """See `Graph.swiglu`."""
        name = gate.name.partition("/")[0].rpartition(".")[0] + ".swiglu"
        active = self.file.node(f"{CONTRIB}.QuickGelu", [gate.name], f"{name}.silu", alpha=1.0)
        return Value(self.file.node("Mul", [active, up.name], name))

    def attention(self, q: Value, k: Value, v: Value, layer: int) -> Value:
        """See `Graph.attention`; rotation, cache and softmax are one operator."""
        config, name = self.config, f"model.layers.{layer}.self_attn.attention"
        if config.image_attention == "bidirectional":
            return super().attention(q, k, v, layer)
        rotary, gated, window = False, config.is_gated(layer), config.window(layer)
        wide = config.cached_width(layer) > config.head_dim
        if wide:
            q, k, v = self._marked(q, k, v, name)
        elif not gated and isinstance(q, Rotated) and isinstance(k, Rotated):
            rotary = self._rotates()
            q, k = (q.source, k.source) if rotary else (q, k)
        packed = None if gated else _packed(q, k, v)  # SPIN reads the keys by themselves
        inputs = [packed, "", ""] if packed else [q.name, k.name, v.name]
        keys, values = self.state(layer, "key"), self.state(layer, "value")
        inputs += [keys[0], values[0], *self._lengths]
        inputs += [*self._rope_caches, self._slots] if rotary else ["", "", ""]
        y, *_ = self.file.nodes(
            f"{CONTRIB}.GroupQueryAttention",
            [*inputs, self._padding_bias],
            name,
            ["*", keys[1], values[1]],
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            do_rotary=int(rotary),
            **({"scale": config.logit_scale} if wide or config.attention_scale else {}),
            **({} if window is None else {"local_window_size": window}),
        )
        if wide:
            return Value(self.head_gate.narrowed(y, name))
        if config.sums_keys(layer):
            sums = self.state(layer, "spin")
            y = self.head_gate.gated_by_sums(y, q.name, k.name, sums, name)
        return Value(y)

    def _rotates(self) -> bool:
        """Whether the operator rotates by itself.

        Two tables of every position would outweigh what that saves, and it knows one axis only.
        """
        config = self.config
        plain = config.local_rope is None and config.rope.mrope_section is None
        return plain and config.head_dim % ROTARY_UNIT == 0

    def _fused_norm(self, x: str, weight: str, name: str) -> str:
        return self.file.node(
            "SimplifiedLayerNormalization",
            [x, weight],
            name,
            axis=-1,
            epsilon=self.config.rms_norm_eps,
            stash_type=1,
        )

    def _head_norm(self, x: Value, name: str) -> str:
        weight = self.file.weight(f"{name}.weight", self.writer.array(f"{name}.weight"))
        heads = self._reshape(x.name, [0, 0, -1, self.config.head_dim], f"{name}.heads")
        return self._flatten_heads(self._fused_norm(heads, weight, name), f"{name}.flatten")

    def _convolve(self, x: str, taps: str, past: str, present: str, name: str) -> str:
        return self.file.nodes(
            f"{CONTRIB}.CausalConvWithState",
            [x, taps, "", past],
            name,
            ["*", present],
            activation="none",
        )[0]

    def _project(self, channels: str, weight: str, name: str) -> str:
        return self.file.node(f"{CONTRIB}.FusedMatMul", [channels, weight], name, transA=1)

    def _log_sigmoid(self, minus_a: str, minus_bias: str, name: str) -> str:
        scale = np.full(
            self.file.shape(minus_bias), -1.0 / self.config.lawcat.gate_divisor, np.float32
        )
        inputs = [minus_a, minus_bias, self.file.constant(scale, "gate_scale")]
        return self.file.node(f"{CONTRIB}.LinearAttentionGate", inputs, name)

    def _recurrence(
        self, q: str, k: str, v: str, g: str | None, sizes: tuple[int, int], layer: int, name: str
    ) -> str:
        past, present = self.state(layer, "ssm")
        return self.file.nodes(
            f"{CONTRIB}.LinearAttention",
            [q, k, v, past] if g is None else [q, k, v, past, g],
            name,
            ["*", present],
            q_num_heads=self.config.num_heads,
            kv_num_heads=sizes[0],
            update_rule="linear" if g is None else "gated",
            scale=1.0,
        )[0]

    @functools.cached_property
    def _lengths(self) -> tuple[str, str]:
        """S - 1 for each sequence, int32 `[B]`, and S, int32 scalar."""
        total = self.file.node("Cast", [self.total], "total.int32", to=TensorProto.INT32)
        one = self.file.constant(np.asarray([1], np.int32), "one")
        last = self.file.node("Sub", [total, one], "total.last")
        batch = self.file.node("Shape", [self._given], "batch", start=0, end=1)
        lengths = self.file.node("Expand", [last, batch], "total.lengths")
        return lengths, self._reshape(total, [], "total.scalar")

    @functools.cached_property
    def _rope_caches(self) -> tuple[str, str]:
        """Cosines and sines of every position, `[2 context_length, d / 2]`.

        A row may stand behind as much padding as another row's prompt is long.
        """
        positions = torch.arange(2 * self.config.context_length)
        tables = rope_tables(self.config.rope, self.config.head_dim, positions)
        cos, sin = (table.contiguous().numpy() for table in tables)
        return self.file.weight("rope.cos", cos), self.file.weight("rope.sin", sin)

    @functools.cached_property
    def _slots(self) -> str:
        """Positions for the rotation, `[B, T]`: `position_ids` plus each row's leading padding.

        Only differences matter; and in a first call the operator counts up from the first position.
        """
        mask = self.file.node("Cast", [self._attention_mask], "slots.cast", to=TensorProto.INT32)
        leading = self.file.node("ArgMax", [mask], "slots.leading", axis=1, keepdims=1)
        shifted = self.file.node("Add", ["position_ids", leading], "slots.shifted")
        end = self._reshape(self.total, [], "slots.end")
        time = self._reshape(self.time, [], "slots.time")
        start = self.file.node("Sub", [end, time], "slots.start")
        one = self.file.constant(np.asarray(1, np.int64), "slots.step")
        steps = self.file.node("Range", [start, end, one], "slots.steps")
        return self.file.node("Min", [shifted, steps], "slots")

    @functools.cached_property
    def _padding_bias(self) -> str:
        """0 where `attention_mask` is 1, else very negative: `[B, 1, T, S]`."""
        mask = self.file.node("Cast", [self._attention_mask], "bias.mask", to=TensorProto.FLOAT)
        one = self.file.constant(np.float32(1), "bias.one")
        absent = self.file.node("Sub", [one, mask], "bias.absent")
        hidden = self.file.constant(np.float32(HIDDEN), "bias.hidden")
        bias = self.file.node("Mul", [absent, hidden], "bias.values")
        bias = self.file.node("Unsqueeze", [bias, self.file.constant([1, 2])], "bias.row")
        ones = self.file.constant([1, 1])
        shape = self.file.node(
            "Concat", [ones, self.time, self.file.constant([1])], "bias.shape", axis=0
        )
        return self.file.node("Expand", [bias, shape], "bias")


def _packed(q: Value, k: Value, v: Value) -> str | None:
    """The unsplit output of one fused linear layer, if q, k and v are exactly its parts."""
    parts = (q, k, v)
    if not all(isinstance(x, Part) for x in parts):
        return None
    first, second, third = (x for x in parts if isinstance(x, Part))
    same = first.fused is second.fused is third.fused
    if not (same and first.fused.pending and [first.index, second.index, third.index] == [0, 1, 2]):
        return None
    return first.fused.whole()
