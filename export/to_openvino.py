"""The decoder as one stateful OpenVINO IR: a dynamic-T graph that serves prefill and decode alike.

`openvino_call.py` has what all layers share. Weights stay memory-mapped until written.
"""

from collections.abc import Sequence
from typing import Any

import openvino as ov
import torch
from openvino import opset15 as op
from torch.nn import functional

from edgekit.bundle import IMAGE_MASS
from edgekit.export.openvino_call import Call
from edgekit.export.openvino_lawcat import gated_attention
from edgekit.export.openvino_side import sided
from edgekit.export.openvino_values import at, ints, named, scalar, sliced
from edgekit.export.openvino_weights import WeightConstants
from edgekit.export.openvino_window import LinearPart, window_attention
from edgekit.export.side_paths import NO_SIDE_PATHS, SidePaths
from edgekit.export.states import history_channels, refuse_gate, value_channels
from edgekit.models.config import DecoderConfig
from edgekit.models.describe import describe_decoder
from edgekit.models.weights import WeightStore

__all__ = ["build_openvino"]

Handle = Any  # an openvino.Output: the package ships no types
LAST_POSITION = "last_position"  # the runtime bypasses this node when all logits are wanted


def build_openvino(
    config: DecoderConfig,
    weights: WeightStore,
    *,
    half: bool = False,
    side: SidePaths = NO_SIDE_PATHS,
) -> ov.Model:
    """Build the stateful model of a decoder.

    Args:
        config: the decoder, with a mixer per layer.
        weights: its tensors; they are referenced, not copied.
        half: hold the large matrices in 16 bits (sources of 16 bits stay as they are).
        side: low-rank paths beside linear layers.

    Returns:
        A model with the inputs of `states.input_names` and `beam_idx`, output `logits` (after it,
        with `spin_scores`, `image_mass`), one variable per state and three per slot.
    """
    graph = OpenVinoGraph(config, weights, half=half, side=side)
    describe_decoder(graph, config)
    return graph.finish()


class OpenVinoGraph:
    """`mixers.graph.Graph` over OpenVINO nodes; handles are `[B, T', width]` outputs."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: WeightStore,
        *,
        half: bool = False,
        side: SidePaths = NO_SIDE_PATHS,
    ) -> None:
        """Create the inputs and everything that all layers share."""
        self._config, self._side = config, side
        self._weights = WeightConstants(weights, half=half)
        self._sinks: list[ov.Node] = []
        self._call = Call(config)
        self._logits: Handle | None = None

    def finish(self) -> ov.Model:
        """The finished model; call once, after `logits`."""
        assert self._logits is not None
        results = [_result(self._logits, "logits")]  # the first: GenAI looks for the head there
        if self._config.spin_scores:
            results.append(_result(self._call.gate.image_mass(), IMAGE_MASS))
        model = ov.Model(
            results, self._sinks, list(self._call.inputs.values()), self._config.family
        )
        model.validate_nodes_and_infer_types()
        model.edgekit_owners = self._weights.owners
        return model

    def embed(self, name: str) -> Handle:
        """Gather of the table's rows; nothing where embeddings are given."""
        given = self._call.given
        if self._call.recurrent:
            given = self._call.pad_time(given, 1)
        if self._config.reads == "embeddings":
            return given
        rows = named(op.gather(self._weights.matrix(f"{name}.weight"), given, ints(0)), name)
        if self._config.embedding_scale == 1:
            return rows
        return op.multiply(rows, scalar(self._config.embedding_scale)).output(0)

    def add(self, x: Handle, y: Handle) -> Handle:
        """Elementwise sum."""
        return op.add(x, y).output(0)

    def rms_norm(self, x: Handle, name: str) -> Handle:
        """In the form that the CPU plug-in fuses into one node."""
        mean = op.reduce_mean(op.power(x, scalar(2.0)), ints([-1]), True)
        inverse = op.divide(scalar(1.0), op.sqrt(op.add(mean, scalar(self._config.rms_norm_eps))))
        return named(
            op.multiply(self._weights.small(f"{name}.weight"), op.multiply(x, inverse)), name
        )

    def head_norm(self, x: Handle, name: str) -> Handle:
        """The same on the last axis of `[B, T', heads, d]`."""
        split = op.reshape(x, ints([0, 0, -1, self._config.head_dim]), True).output(0)
        return op.reshape(self.rms_norm(split, name), ints([0, 0, -1]), True).output(0)

    def linears(self, x: Handle, names: Sequence[str]) -> list[Handle]:
        """One MatMul each, under its own name: run-time LoRA looks for it."""
        return [self._linear(x, name, self._weights.matrix(f"{name}.weight")) for name in names]

    def dense(self, x: Handle, name: str) -> Handle:
        """The same with a weight that keeps full precision."""
        return self._linear(x, name, self._weights.small(f"{name}.weight"))

    def _linear(self, x: Handle, name: str, weight: Handle) -> Handle:
        y, sinks = sided(named(op.matmul(x, weight, False, True), name), x, name, self._side)
        self._sinks += sinks
        if f"{name}.bias" not in self._weights.store:
            return y
        return named(op.add(y, self._weights.small(f"{name}.bias")), f"{name}.bias_add")

    def swiglu(self, gate: Handle, up: Handle) -> Handle:
        """Swish, then product."""
        return op.multiply(op.swish(gate), up).output(0)

    def geglu(self, gate: Handle, up: Handle) -> Handle:
        """Gelu, then product."""
        return op.multiply(op.gelu(gate, "tanh"), up).output(0)

    def rope(self, x: Handle, layer: int) -> Handle:
        """X cos + rotate_half(x) sin on `[B, heads, T', d]`, the form that the plug-in fuses."""
        d = self._config.head_dim
        heads = self._heads(x, d)
        low = sliced(heads, ints([0]), ints([d // 2]), 3)
        high = sliced(heads, ints([d // 2]), ints([d]), 3)
        turned = op.concat([op.multiply(high, scalar(-1.0)), low], 3)
        cos, sin = self._call.rotation(layer)
        return self._joined(op.add(op.multiply(heads, cos), op.multiply(turned, sin)).output(0))

    def repeat_heads(self, x: Handle, head_width: int, times: int) -> Handle:
        """Broadcast along an axis beside the heads."""
        split = op.reshape(x, ints([0, 0, -1, 1, head_width]), True)
        copies = op.concat([split] * times, 3)
        return op.reshape(copies, ints([0, 0, -1]), True).output(0)

    def attention(self, q: Handle, k: Handle, v: Handle, layer: int) -> Handle:
        """Attention over stateful keys and values, in the form that the plug-in fuses."""
        config = self._config
        q, k, v = (self._heads(self._call.unpadded(x), config.head_dim) for x in (q, k, v))
        name, d, width = f"past_key_values.{layer}", config.head_dim, config.cached_width(layer)
        if width > d:
            v = self._call.gate.marked(v, width - d).output(0)
        keys = self._grown(k, f"{name}.key", d)
        values = self._grown(v, f"{name}.value", width)
        scale = () if config.attention_scale is None else (scalar(config.attention_scale),)
        y = op.scaled_dot_product_attention(q, keys, values, self._call.visible(layer), *scale)
        y = named(y, f"model.layers.{layer}.self_attn.attention")
        if width > d:
            mass = sliced(y, ints([d]), ints([d + 1]), 3)
            y = self._call.gate.gated(sliced(y, ints([0]), ints([d]), 3), mass)
        elif config.sums_keys(layer):
            y = self._call.gate.gated_by_sums(y, q, self._summed(k, f"{name}.spin"))
        joined = self._joined(y)
        return self._call.pad_time(joined, 1) if self._call.recurrent else joined

    def _summed(self, k: Handle, name: str) -> Handle:
        """Sums of image keys for each query, `HeadGate.summed`; the last row is the state."""
        past = self._state(name, [self._config.num_kv_heads, self._config.head_dim + 1])
        sums = self._call.gate.summed(k, self._call.counted, past)
        self._assign(op.gather(sums, ints(-1), ints(2)).output(0), name)
        return sums

    def causal_conv(
        self, q: Handle, k: Handle, q_name: str, k_name: str, layer: int
    ) -> tuple[Handle, Handle]:
        """One depthwise GroupConvolution over [state, input]."""
        config = self._config
        taps = torch.cat(
            [self._weights.store.tensor(f"{n}.weight").float() for n in (q_name, k_name)]
        )
        x = op.multiply(op.concat([q, k], 2), self._call.mask)
        joined = self._history(x, f"cache_params.past.conv.{layer}", *taps.shape)
        kernel = self._weights.constant(taps[:, None, None].contiguous())
        y = named(op.group_convolution(joined, kernel, [1], [0], [0], [1]), q_name)
        y = op.transpose(y, ints([0, 2, 1])).output(0)
        split = op.variadic_split(
            y,
            ints(2),
            ints([config.num_heads * config.head_dim, config.state_heads * config.head_dim]),
        )
        return split.output(0), split.output(1)

    def _history(self, x: Handle, name: str, channels: int, size: int) -> Handle:
        """`x [B, T', C]` after the size - 1 columns of state `name`, `[B, C, size - 1 + T']`."""
        past = self._state(name, [channels, size - 1])
        joined = op.concat([past, op.transpose(x, ints([0, 2, 1]))], 2).output(0)
        end = op.add(self._call.length, ints([size - 1]))
        self._assign(sliced(joined, self._call.length, end, 2), name)
        return joined

    def feature_map(self, q: Handle, k: Handle, name: str) -> tuple[Handle, Handle]:
        """All heads of q and of k at once; what the convolution left joint is not taken apart."""
        config = self._config
        weight = self._weights.store.tensor(f"{name}.weight").float()
        per_query = weight.repeat_interleave(config.num_heads // config.state_heads, dim=0)
        both = op.concat([q, k], 2).output(0)
        features = self._features(both, torch.cat((per_query, weight)), name)
        heads = ints([config.num_heads, config.state_heads])
        split = op.variadic_split(features, ints(1), heads)
        return split.output(0), split.output(1)

    def _features(self, x: Handle, weight: torch.Tensor, name: str) -> Handle:
        """U and -u from one product with [W, -W], then one softmax over each half."""
        both = self._weights.constant(torch.cat((weight, -weight), dim=2))
        u = named(op.matmul(self._heads(x, weight.shape[1]), both, False, False), name)
        halves = op.reshape(u, ints([0, 0, 0, 2, -1]), True)
        positive = op.maximum(op.softmax(halves, 4), scalar(1e-12))
        return op.reshape(positive, ints([0, 0, 0, -1]), True).output(0)

    def log_decay(self, x: Handle, down_name: str, up_name: str) -> Handle:
        """logsigmoid(a) = -softplus(-a)."""
        options = self._config.lawcat
        a = self.dense(self.dense(x, down_name), up_name)
        log_sigmoid = op.multiply(op.softplus(op.negative(a)), scalar(-1.0 / options.gate_divisor))
        return op.maximum(log_sigmoid, scalar(options.gate_floor)).output(0)

    def linear_attention(self, q: Handle, k: Handle, v: Handle, g: Handle, layer: int) -> Handle:
        """The recurrence; features come as `[B, heads, T', F]`, v and g as `[B, T', width]`."""
        config = self._config
        mask = op.unsqueeze(self._call.mask, ints([1]))
        k = op.multiply(k, mask).output(0)
        g = op.multiply(self._heads(g, config.state_rows), mask).output(0)
        name = f"cache_params.past.ssm.{layer}"
        past = self._state(name, [config.state_heads, config.state_rows, config.value_columns])
        values = self._heads(v, config.head_dim)
        gate = self._call.padded_gate if config.is_gated(layer) else None
        chunking = self._call.chunking
        y, after = gated_attention(q, k, values, g, past, chunking, config, gate, name=name)
        self._assign(after, name)
        return y

    def window_attention(self, q: Handle, k: Handle, v: Handle, prefix: str, layer: int) -> Handle:
        """A band of the history for each chunk, and a linear state of what left it."""
        config, options = self._config, self._config.lolcats
        refuse_gate(config, layer)
        mask, name = self._call.mask, f"cache_params.past.ssm.{layer}"
        x = op.concat([op.multiply(op.concat([k, v], 2), mask), mask], 2).output(0)
        window = f"cache_params.past.conv.{layer}"
        columns = self._history(x, window, history_channels(config), options.window + 1)
        history = op.transpose(columns, ints([0, 2, 1])).output(0)
        gone = self._call.pad_time(sliced(history, ints([0]), self._call.length, 1), 1)
        keys = sliced(gone, ints([0]), ints([config.num_kv_heads * config.head_dim]), 2)
        keys = self.repeat_heads(keys, config.head_dim, config.groups)
        maps = [
            self._weights.store.tensor(f"{prefix}.feature_map_{n}.weight").float() for n in "qk"
        ]
        values = op.gather(gone, ints(value_channels(config)), ints(2)).output(0)
        rows = options.features(config.head_dim)
        linear = LinearPart(
            phi_q=self._features(q, maps[0], f"{prefix}.feature_map_q"),
            phi_k=self._features(keys, maps[1], f"{prefix}.feature_map_k"),
            values=self._heads(values, config.value_columns),
            past=self._state(name, [config.num_heads, rows, config.value_columns]),
        )
        factor = self._weights.store.tensor(f"{prefix}.window_factor.weight").float()
        shape = (config.num_kv_heads, config.groups, 1, 1, 1)
        log_gamma = self._weights.constant(functional.logsigmoid(factor).reshape(shape))
        y, after = window_attention(q, history, log_gamma, linear, self._call.bands, config)
        self._assign(after, name)
        return y

    def logits(self, x: Handle, name: str) -> None:
        """The head over the last position."""
        start = op.subtract(self._call.length, ints([1]))
        last = op.slice(x, start, self._call.length, ints([1]), ints([1]))
        last.set_friendly_name(LAST_POSITION)
        product = op.matmul(last, self._weights.matrix(f"{name}.weight"), False, True)
        self._logits = named(product, "lm_head")

    def _heads(self, x: Handle, width: int) -> Handle:
        """`[B, T, heads * width]` to `[B, heads, T, width]`."""
        split = op.reshape(x, ints([0, 0, -1, width]), True)
        return op.transpose(split, ints([0, 2, 1, 3])).output(0)

    def _joined(self, x: Handle) -> Handle:
        """`[B, heads, T, width]` to `[B, T, heads * width]`."""
        return op.reshape(op.transpose(x, ints([0, 2, 1, 3])), ints([0, 0, -1]), True).output(0)

    def _state(self, name: str, shape: Sequence[int]) -> Handle:
        """Variable `name [B, *shape]`, zero at first, reordered by `beam_idx`; -1 grows."""
        start = [max(size, 0) for size in shape]
        initial = op.broadcast(scalar(0.0), op.concat([self._call.batch, ints(start)], 0))
        read = op.read_value(initial, name, ov.Type.f32, ov.PartialShape([-1, *shape]))
        read.set_friendly_name(name)
        return op.gather(read, self._call.inputs["beam_idx"], ints(0)).output(0)

    def _assign(self, value: Handle, name: str) -> None:
        node = value.get_node()
        if node.get_output_size() > 1:  # an Assign takes a node, so a single output
            node = op.reshape(value, op.shape_of(value), False)
        self._sinks.append(op.assign(node, name))

    def _grown(self, x: Handle, name: str, width: int) -> Handle:
        """Keys or values so far, `[B, Hkv, S, width]`, repeated to the query heads."""
        config = self._config
        past = self._state(name, [config.num_kv_heads, -1, width])
        grown = op.concat([past, x], 2)
        self._assign(grown.output(0), name)
        if config.groups == 1:
            return grown.output(0)
        apart = op.unsqueeze(grown, ints([2]))
        total, heads = at(op.shape_of(grown), 2), ints([config.num_kv_heads, config.groups])
        shape = op.concat([self._call.batch, heads, total, ints([width])], 0)
        copies = op.broadcast(apart, shape, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(copies, ints([0, config.num_heads, -1, width]), True).output(0)


def _result(value: Handle, name: str) -> ov.Node:
    result = op.result(value)
    result.set_friendly_name(name)
    result.get_output_tensor(0).set_names({name})
    return result
