"""The vocabulary of `mixers/graph.py` in ONNX: what both operator sets share.

`onnx_contrib.ContribGraph` and `onnx_portable.PortableGraph` add the steps that differ: norms, the
gated unit, softmax attention, convolution, decay and the recurrence. B batch, T tokens of this
call, S tokens so far.
"""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
from onnx import TensorProto

from edgekit.errors import UnsupportedError
from edgekit.export.onnx_chunks import Chunks
from edgekit.export.onnx_file import OnnxFile
from edgekit.export.onnx_linear import Columns, LinearWriter, repeat_heads
from edgekit.export.onnx_rope import RopeTables, declare_positions
from edgekit.export.onnx_side import SideWriter
from edgekit.export.onnx_spin import HeadGateWriter
from edgekit.export.onnx_table import TokenTable
from edgekit.export.onnx_values import (
    Decay,
    FusedLinear,
    Joint,
    Part,
    Repeated,
    Rotated,
    Sum,
    Value,
    pair,
)
from edgekit.export.side_paths import NO_SIDE_PATHS, SidePaths
from edgekit.export.states import EMBEDDINGS, IMAGE_MASK, state_records
from edgekit.models.config import DecoderConfig, RopeConfig

__all__ = ["LAST_LOGITS", "OnnxGraph"]

FEATURE_FLOOR = 1e-12
LAST_LOGITS = "last_logits"
END = np.iinfo(np.int64).max
Kind = Literal["conv", "ssm", "key", "value", "spin"]


class OnnxGraph:
    """Builds one decoder; see `mixers/graph.py` for what each method means."""

    def __init__(
        self,
        file: OnnxFile,
        writer: LinearWriter,
        config: DecoderConfig,
        side: SidePaths = NO_SIDE_PATHS,
    ) -> None:
        """Declare the inputs; `describe_decoder` adds the rest."""
        self.file, self.writer, self.config = file, writer, config
        self._given = self._declare_given()
        self._side = SideWriter(file, writer.weights, side, self._given)
        self._states = {(record.layer, record.kind): record for record in state_records(config)}
        self._table = TokenTable(file, writer)
        self._rope = RopeTables(file, config.head_dim)
        self._attention_mask = file.input("attention_mask", TensorProto.INT64, ["batch", "total"])
        if config.needs_positions:
            declare_positions(file, config.rope)
        if config.spin is not None:
            self.head_gate = HeadGateWriter(file, config, self.time, lambda: self.mask)
        elif config.reads_images:
            file.input(IMAGE_MASK, TensorProto.INT64, ["batch", "image_time"])
        self._keep = file.optional_input("logits_to_keep", np.asarray(1, np.int64))

    def _declare_given(self) -> str:
        """The first input: token ids `[B, T]`, or embeddings `[B, T, D]`."""
        if self.config.image_flag:
            raise UnsupportedError("image_flag is a channel for runtimes of the OpenVINO graph")
        if self.config.reads == "tokens":
            return self.file.input("input_ids", TensorProto.INT64, ["batch", "time"])
        shape: list[int | str] = ["batch", "time", self.config.hidden_size]
        return self.file.input(EMBEDDINGS, TensorProto.FLOAT, shape)

    def embed(self, name: str) -> Value:
        """See `Graph.embed`; nothing where embeddings are given."""
        if self.config.reads == "embeddings":
            return Value(self._given)
        rows, scale = self._table.embed(name, self._given), self.config.embedding_scale
        if scale == 1:
            return Value(rows)
        factor = self.file.constant(np.float32(scale), f"{name}.scale")
        return Value(self.file.node("Mul", [rows, factor], f"{name}.scaled"))

    def add(self, x: Value, y: Value) -> Sum:
        """See `Graph.add`; a norm that follows takes the sum over."""
        return Sum(x, y, lambda: self.file.node("Add", [x.name, y.name], "residual"))

    def linears(self, x: Value, names: Sequence[str]) -> list[Value]:
        """See `Graph.linears`."""
        return list(FusedLinear(self.file, self.writer, self._side, x, names).parts())

    def dense(self, x: Value, name: str) -> Value:
        """See `Graph.dense`."""
        y = self.writer.dense(x.name, name)
        if f"{name}.bias" not in self.writer.weights:
            return Value(y)
        bias = self.file.weight(f"{name}.bias", self.writer.array(f"{name}.bias"))
        return Value(self.file.node("Add", [y, bias], f"{name}.add"))

    def rope(self, x: Value, layer: int) -> Rotated:
        """See `Graph.rope`; an attention operator may rotate by itself."""
        return Rotated(x, lambda: self._rotate(x.name, self.config.rope_of(layer)))

    def repeat_heads(self, x: Value | Decay, head_width: int, times: int) -> Value | Decay:
        """See `Graph.repeat_heads`; decays and linear layers take them over."""
        if isinstance(x, Decay):
            return Decay(x.x, x.down, x.up, x.times * times)
        return Repeated(x, head_width, times, lambda: self._repeat(x, head_width, times))

    def log_decay(self, x: Value, down_name: str, up_name: str) -> Decay:
        """See `Graph.log_decay`."""
        return Decay(x, down_name, up_name)

    def causal_conv(
        self, q: Value, k: Value, q_name: str, k_name: str, layer: int
    ) -> tuple[Value, Value]:
        """See `Graph.causal_conv`; q and k stay joint until someone takes them apart."""
        widths = tuple(len(self.writer.weights.tensor(f"{n}.weight")) for n in (q_name, k_name))
        joint = Joint((widths[0], widths[1]), lambda: self._conv(q, k, q_name, k_name, layer))
        halves = pair(lambda: self._time_major(joint, q_name))
        return _Half(joint, halves[0]), _Half(joint, halves[1])

    def feature_map(self, q: Value, k: Value, name: str) -> tuple[Value, Value]:
        """See `Graph.feature_map`."""
        return pair(lambda: self._features(q, k, name))

    def linear_attention(self, q: Value, k: Value, v: Value, g: Decay, layer: int) -> Value:
        """See `Graph.linear_attention`."""
        config, prefix = self.config, f"model.layers.{layer}.self_attn.linear_attention"
        gated, values = config.is_gated(layer), self._value_columns(v).name
        if gated:
            values = self.head_gate.marked_columns(values, prefix)
        inputs = (q.name, k.name, values, self._decay(g))
        owners = (config.state_heads, config.state_rows)
        numerators = self._recurrence(*inputs, owners, layer, prefix)  # [B, T, H * value_columns]
        d, columns = config.head_dim, config.value_columns
        heads = self._reshape(numerators, [0, 0, config.num_heads, columns], f"{prefix}.heads")
        widths = (d, 1, 1, columns - d - 2) if gated else (d, 1, columns - d - 1)
        sizes = [width for width in widths if width]
        weighted, total, *rest = self.file.nodes(
            "Split", [heads, self.file.constant(sizes)], f"{prefix}.parts", len(sizes), axis=-1
        )
        mean = self._finished(weighted, total, prefix)
        if gated:
            mass = self._finished(rest[0], total, f"{prefix}.mass")
            mean = self.head_gate.gated(mean, mass, prefix)
        return Value(self._reshape(mean, [0, 0, config.num_heads * d], f"{prefix}.flatten"))

    def logits(self, x: Value, name: str) -> None:
        """See `Graph.logits`; the input `logits_to_keep` says how many positions, 1 by default.

        What else is asked of the last position comes with it.
        """
        keep = self.file.node("Neg", [self._keep], "last_position.start")
        start = self._reshape(keep, [1], "last_position.starts")
        bounds = [start, self.file.constant([END]), self.file.constant([1])]
        last = self.file.node("Slice", [x.name, *bounds], "last_position")
        logits = self._table.head(last, name)
        vocab = self.config.vocab_size
        every = self.file.output("logits", TensorProto.FLOAT, ["batch", "positions", vocab])
        self.file.rename_output(logits, every)
        # The same for onnxruntime-genai, which must read in the shape that there is one position.
        one = self.file.output(LAST_LOGITS, TensorProto.FLOAT, ["batch", 1, vocab])
        bounds = [self.file.constant([n]) for n in (-1, END, 1)]
        self.file.nodes("Slice", [every, *bounds], LAST_LOGITS, [one])
        if self.config.spin_scores:
            self.head_gate.write_image_mass()

    def _finished(self, weighted: str, total: str, name: str) -> str:
        """Divided by the normaliser `total`, or scaled: `[B, T, H, d]`."""
        options = self.config.lawcat
        if not options.normaliser:
            scale = self.file.constant(np.float32(self.config.state_rows**-0.5), f"{name}.scale")
            return self.file.node("Mul", [weighted, scale], f"{name}.scaled")
        eps = self.file.constant(np.float32(options.eps), "eps")
        total = self.file.node("Add", [total, eps], f"{name}.plus_eps")
        return self.file.node("Div", [weighted, total], f"{name}.mean")

    @abstractmethod
    def rms_norm(self, x: Value, name: str) -> Value:
        """See `Graph.rms_norm`."""

    @abstractmethod
    def head_norm(self, x: Value, name: str) -> Value:
        """See `Graph.head_norm`."""

    @abstractmethod
    def swiglu(self, gate: Value, up: Value) -> Value:
        """See `Graph.swiglu`."""

    @abstractmethod
    def attention(self, q: Value, k: Value, v: Value, layer: int) -> Value:
        """See `Graph.attention`."""

    @abstractmethod
    def _convolve(self, x: str, taps: str, past: str, present: str, name: str) -> str:
        """Convolve `x [B, C, T]` with `taps [C, 1, K]` after the inputs `past [B, C, K - 1]`."""

    @abstractmethod
    def _project(self, channels: str, weight: str, name: str) -> str:
        """`[B, R, N, d, T]` transposed, times `weight [N, d, f]`: `[B, R, N, T, f]`."""

    @abstractmethod
    def _log_sigmoid(self, minus_a: str, minus_bias: str, name: str) -> str:
        """logsigmoid(a + bias) / gate_divisor of `[B, T, width]`, given -a and -bias."""

    @abstractmethod
    def _recurrence(
        self, q: str, k: str, v: str, g: str | None, sizes: tuple[int, int], layer: int, name: str
    ) -> str:
        """Linear attention without its division: `[B, T, H * value_columns]`.

        Features q and k, value columns v; g is the log decay, None for no decay; `sizes` are the
        heads that own a state and the features of each.
        """

    def state(self, layer: int, kind: Kind) -> tuple[str, str]:
        """Declare a state; returns the names of its graph input and output."""
        record = self._states[layer, kind]
        for declare, grown, name in zip(
            (self.file.input, self.file.output), ("past", "total"), record.onnx, strict=True
        ):
            shape = record.shape_on("onnx")
            axes: list[int | str] = [grown if n < 0 else n for n in shape[1:]]
            declare(name, TensorProto.FLOAT, ["batch", *axes])
        return record.onnx

    @functools.cached_property
    def chunks(self) -> Chunks:
        """How T is cut where an operator works chunk by chunk."""
        return Chunks(self.file, self.time)

    @functools.cached_property
    def time(self) -> str:
        """T, int64 `[1]`."""
        return self.file.node("Shape", [self._given], "time", start=1, end=2)

    @functools.cached_property
    def total(self) -> str:
        """S, int64 `[1]`: the width of `attention_mask`."""
        return self.file.node("Shape", [self._attention_mask], "total", start=1, end=2)

    @functools.cached_property
    def mask(self) -> str:
        """1 for the tokens of this call, 0 for padding, fp32 `[B, T, 1]`."""
        start = self.file.node("Neg", [self.time], "mask.start")
        bounds = [start, self.file.constant([END]), self.file.constant([1])]
        recent = self.file.node("Slice", [self._attention_mask, *bounds], "mask.recent")
        number = self.file.node("Cast", [recent], "mask.cast", to=TensorProto.FLOAT)
        return self.file.node("Unsqueeze", [number, self.file.constant([-1])], "mask")

    @functools.cached_property
    def _floor(self) -> str:
        """Lower bound of the log decay g <= 0, `[B, T, 1]`: the gate's floor, and 0 on padding."""
        floor = self.file.constant(np.float32(self.config.lawcat.gate_floor), "gate_floor")
        return self.file.node("Mul", [self.mask, floor], "mask.gate_floor")

    def _rotate(self, x: str, rope: RopeConfig) -> str:
        cos, sin = self._rope.of(rope)
        d, name = self.config.head_dim, f"{x.partition('/')[0]}.rope"
        heads = self._reshape(x, [0, 0, -1, d], f"{name}.heads")
        low, high = self.file.nodes("Split", [heads], f"{name}.halves", 2, axis=-1, num_outputs=2)
        node = functools.partial(self.file.node, name=name)
        first = node("Sub", [node("Mul", [low, cos]), node("Mul", [high, sin])])
        second = node("Add", [node("Mul", [high, cos]), node("Mul", [low, sin])])
        both = self.file.node("Concat", [first, second], f"{name}.concat", axis=-1)
        return self._flatten_heads(both, f"{name}.flatten")

    def _repeat(self, x: Value, width: int, times: int) -> str:
        if isinstance(x, Part) and x.fused.pending:
            x.fused.repeat(x.index, width, times)
            return x.name
        name = f"{x.name.partition('/')[0]}.repeat"
        heads = self._reshape(x.name, [0, 0, -1, 1, width], f"{name}.heads")
        copies = self.file.node("Concat", [heads] * times, name, axis=3)
        return self._flatten_heads(copies, f"{name}.flatten", axes=3)

    def _flatten_heads(self, x: str, name: str, axes: int = 2) -> str:
        """The last `axes` axes as one."""
        shape = [self.file.node("Shape", [x], f"{name}.rows", end=2), self.file.constant([-1])]
        wanted = self.file.node("Concat", shape, f"{name}.shape", axis=0)
        return self.file.node("Reshape", [x, wanted], name)

    def _reshape(self, x: str, shape: Sequence[int], name: str) -> str:
        return self.file.node("Reshape", [x, self.file.constant(list(shape))], name)

    def _marked(self, q: Value, k: Value, v: Value, name: str) -> tuple[Value, Value, Value]:
        """Queries, keys and values of a gated layer, all as wide as its cache."""
        q, k = (
            Value(self.head_gate.widened(x.name, f"{name}.{n}")) for x, n in ((q, "q"), (k, "k"))
        )
        return q, k, Value(self.head_gate.marked(v.name, f"{name}.v"))

    def _value_columns(self, v: Value) -> Value:
        """Values with their normaliser column and padding, zero on padded tokens."""
        source, times = (v.source, v.times) if isinstance(v, Repeated) else (v, 1)
        assert isinstance(source, Part), "values come straight from a linear layer"
        assert source.fused.pending
        d = self.config.head_dim
        columns = Columns(self.config.num_kv_heads, d, self.config.value_columns)
        source.fused.lay_out(source.index, columns, times, self.mask)
        return source

    def _conv(self, q: Value, k: Value, q_name: str, k_name: str, layer: int) -> str:
        name = f"model.layers.{layer}.self_attn.conv"
        channels = self.file.node(
            "Transpose", [self._joined(q, k, name)], f"{name}.in", perm=[0, 2, 1]
        )
        taps = np.concatenate([self.writer.array(f"{n}.weight") for n in (q_name, k_name)])
        stored = self.file.weight(f"{name}.weight", taps[:, None])
        past, present = self.state(layer, "conv")
        return self._convolve(channels, stored, past, present, name)

    def _joined(self, q: Value, k: Value, name: str) -> str:
        """Both side by side, `[B, T, C]`, padded tokens zero."""
        inner = k.source if isinstance(k, Repeated) else k
        if (
            isinstance(q, Part)
            and isinstance(inner, Part)
            and q.fused is inner.fused
            and (q.index, inner.index) == (0, 1)
            and q.fused.pending
        ):
            if isinstance(k, Repeated):
                q.fused.repeat(1, k.width, k.times)
            return q.fused.first_two()
        return self.file.node("Concat", [q.name, k.name], f"{name}.concat", axis=-1)

    def _time_major(self, joint: Joint, name: str) -> list[str]:
        """Both apart, `[B, T, width]`, out of `[B, C, T]`."""
        rows = self.file.node("Transpose", [joint.name], f"{name}.out", perm=[0, 2, 1])
        sizes = self.file.constant(list(joint.widths))
        return self.file.nodes("Split", [rows, sizes], f"{name}.split", 2, axis=-1)

    def _channels(self, q: Value, k: Value, name: str) -> str:
        """Both as channels `[B, C, T]`."""
        if isinstance(q, _Half) and isinstance(k, _Half) and q.joint is k.joint:
            return q.joint.name
        rows = self.file.node("Concat", [q.name, k.name], f"{name}.concat", axis=-1)
        return self.file.node("Transpose", [rows], f"{name}.in", perm=[0, 2, 1])

    def _features(self, q: Value, k: Value, name: str) -> list[str]:
        config = self.config
        d, f, groups = config.head_dim, config.feature_dim, config.num_heads // config.state_heads
        weight = self.writer.array(f"{name}.weight")  # [state heads, d, f]
        repeats = 2
        if groups > 1:
            weight = np.concatenate([weight.repeat(groups, axis=0), weight])
            repeats = 1
        stored = self.file.weight(f"{name}.weight", np.ascontiguousarray(weight))
        channels = self._channels(q, k, name)
        heads = self._reshape(channels, [0, repeats, len(weight), d, -1], f"{name}.heads")
        u = self._project(heads, stored, name)  # [B, R, N, T, f]
        flat = self._positive(u, repeats * len(weight), f, name)
        sizes = self.file.constant([config.num_heads * 2 * f, config.state_heads * 2 * f])
        return self.file.nodes("Split", [flat, sizes], f"{name}.split", 2, axis=-1)

    def _positive(self, u: str, count: int, f: int, name: str) -> str:
        """max([softmax(u), softmax(-u)], floor) of `[B, ., ., T, f]`: `[B, T, count * 2 f]`."""
        single = self._reshape(u, [0, count, -1, 1, f], f"{name}.single")
        signs = self.file.constant(np.array([[1], [-1]], np.float32), "signs")
        signed = self.file.node("Mul", [single, signs], f"{name}.signed")
        halves = self.file.node("Softmax", [signed], f"{name}.softmax", axis=-1)
        floor = self.file.constant(np.float32(FEATURE_FLOOR), "feature_floor")
        phi = self.file.node("Max", [halves, floor], f"{name}.floor")
        rows = self.file.node("Transpose", [phi], f"{name}.out", perm=[0, 2, 1, 3, 4])
        return self._reshape(rows, [0, 0, count * 2 * f], f"{name}.flatten")

    def _decay(self, g: Decay) -> str:
        """-a = up(down(x)) with the sign in the weights, then logsigmoid, floor and mask."""
        heads = (self.config.state_rows, g.times)
        inner = self.writer.dense(g.x.name, g.down)
        minus_a = self.writer.dense(inner, g.up, scale=-1.0, heads=heads)
        bias = repeat_heads(self.writer.array(f"{g.up}.bias"), *heads)
        stored = self.file.weight(f"{g.up}.bias", -bias)
        decay = self._log_sigmoid(minus_a, stored, f"{g.up}.log_sigmoid")
        return self.file.node("Max", [decay, self._floor], f"{g.up}.floor")


class _Half(Value):
    """q or k of a joint convolution."""

    def __init__(self, joint: Joint, half: Value) -> None:
        super().__init__(lambda: half.name)
        self.joint = joint
