"""What the inputs of one call say, as OpenVINO nodes that all layers share.

B batch, T tokens of this call, S tokens so far. Recurrent layers work on T' >= T: time padded on
the right to N chunks of C <= 64 tokens, so that no layer has to pad for itself.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from edgekit.export.openvino_lawcat import Chunking, chunk_count
from edgekit.export.openvino_spin import HeadGate
from edgekit.export.openvino_values import at, ints, parameter, scalar, sliced, squeezed
from edgekit.export.openvino_window import Bands
from edgekit.export.states import EMBEDDINGS, POSITIONS, input_names
from edgekit.models.config import DecoderConfig, RopeConfig
from edgekit.models.rope import frequency_axes, inverse_frequencies

__all__ = ["Call"]

Handle = Any  # an openvino.Output: the package ships no types
MASKED = float(np.finfo(np.float32).min)


class Call:
    """The inputs, and what follows from them; each node is made once, when it is first asked for.

    Attributes:
        inputs: the graph's parameters by name, `beam_idx` among them.
        recurrent: whether any layer works on T' tokens.
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Declare the inputs of `config`'s graph."""
        self._config = config
        self.recurrent = any(mixer != "softmax" for mixer in config.mixers)
        self.inputs = {name: self._declared(name) for name in input_names(config)}
        self.inputs["beam_idx"] = parameter("beam_idx", [-1], ov.Type.i32)
        self._rotations: dict[RopeConfig, tuple[Handle, Handle]] = {}
        self._masks: dict[int | None, Handle] = {}

    def _declared(self, name: str) -> ov.op.Parameter:
        if name == EMBEDDINGS:
            width = self._config.hidden_size + self._config.image_flag
            return parameter(name, [-1, -1, width], ov.Type.f32)
        if name == POSITIONS and self._config.rope.mrope_section is not None:
            return parameter(name, [3, -1, -1], ov.Type.i64)
        return parameter(name, [-1, -1], ov.Type.i64)

    @cached_property
    def given(self) -> Handle:
        """Token ids `[B, T]`, or embeddings `[B, T, D]`."""
        first = next(iter(self.inputs.values())).output(0)
        if not self._config.image_flag:
            return first
        return sliced(first, ints([0]), ints([self._config.hidden_size]), 2)

    @cached_property
    def batch(self) -> Handle:
        """B, `[1]`."""
        return at(self._shape, 0)

    @cached_property
    def length(self) -> Handle:
        """T, `[1]`."""
        return at(self._shape, 1)

    @cached_property
    def _shape(self) -> ov.Node:
        return op.shape_of(next(iter(self.inputs.values())))

    @cached_property
    def _padding(self) -> Handle:
        """T' - T, `[1]`."""
        chunks = chunk_count(self.length)
        chunk = op.divide(op.subtract(op.add(self.length, chunks), ints([1])), chunks)
        return op.subtract(op.multiply(chunk, chunks), self.length).output(0)

    @cached_property
    def _padded(self) -> Handle:
        """T', `[1]`."""
        return op.add(self.length, self._padding).output(0)

    def pad_time(self, x: Handle, axis: int) -> Handle:
        """T' entries along `axis` where there are T, zero-filled."""
        zero, rank = ints([0]), x.get_partial_shape().rank.get_length()
        ends = [zero] * rank
        ends[axis] = self._padding
        fill = op.constant(0, dtype=x.get_element_type().to_dtype())
        return op.pad(x, ints([0] * rank), op.concat(ends, 0), "constant", fill).output(0)

    def unpadded(self, x: Handle) -> Handle:
        """The first T of T' entries of `[B, T', width]`."""
        return sliced(x, ints([0]), self.length, 1) if self.recurrent else x

    @cached_property
    def chunking(self) -> Chunking:
        """How LAWCAT layers cut time."""
        spin = self._config.spin
        image = None if spin is None or spin.score != "mass" else self.padded_gate.image
        return Chunking.of(self.batch, self._padded, self._config, image)

    @cached_property
    def bands(self) -> Bands:
        """How LoLCATs layers cut time."""
        return Bands.of(self._padded, self._config)

    @cached_property
    def mask(self) -> Handle:
        """1 for tokens, 0 for padding on either side, fp32 `[B, T', 1]`."""
        recent = self._recent(self.inputs["attention_mask"].output(0))
        return op.unsqueeze(self.pad_time(recent, 1), ints([2])).output(0)

    @cached_property
    def gate(self) -> HeadGate:
        """SPIN over the T tokens of this call."""
        assert self._config.spin is not None
        masses: list[Handle] | None = [] if self._config.spin_scores else None
        return HeadGate(self._config.spin, self._image, self.length, masses)

    @cached_property
    def padded_gate(self) -> HeadGate:
        """The same over T'."""
        return replace(self.gate, image=self.pad_time(self._image, 1))

    @cached_property
    def counted(self) -> Handle:
        """1 on the image tokens of this call that are no padding, else 0, fp32 `[B, 1, T, 1]`."""
        tokens = self._recent(self.inputs["attention_mask"].output(0))
        return op.unsqueeze(op.multiply(self._image, tokens), ints([1, 3])).output(0)

    @cached_property
    def _image(self) -> Handle:
        """1 on image tokens, else 0, fp32 `[B, T]`."""
        if not self._config.image_flag:
            return self._recent(self.inputs[self._config.image_input].output(0))
        flag = sliced(self.inputs[EMBEDDINGS].output(0), ints([self._config.hidden_size]), None, 2)
        return op.convert(op.greater(op.squeeze(flag, ints([2])), scalar(0.5)), "f32").output(0)

    def _recent(self, x: Handle) -> Handle:
        """The last T of `[B, S]`, as fp32: a caller may give the mask of all tokens so far."""
        return op.convert(sliced(x, op.negative(self.length), None, 1), "f32").output(0)

    def rotation(self, layer: int) -> tuple[Handle, Handle]:
        """Cosines and sines of a layer, `[B, 1, T', d]`, each half twice."""
        rope = self._config.rope_of(layer)
        if rope not in self._rotations:
            self._rotations[rope] = self._rotation(rope)
        return self._rotations[rope]

    def _rotation(self, rope: RopeConfig) -> tuple[Handle, Handle]:
        frequencies = inverse_frequencies(rope, self._config.head_dim).repeat(2)
        table = op.constant(frequencies[None, None, None].numpy())
        angles = op.multiply(op.convert(self._positions, "f32"), table).output(0)
        if self.recurrent:
            angles = self.pad_time(angles, 2)
        return op.cos(angles).output(0), op.sin(angles).output(0)

    @cached_property
    def _positions(self) -> ov.Node:
        """Positions `[B, 1, T, 1]`, or of the axis that each frequency turns by `[B, 1, T, d]`."""
        given, sections = self.inputs[POSITIONS], self._config.rope.mrope_section
        if sections is None:
            return op.unsqueeze(given, ints([1, 3]))
        per_frequency = op.gather(given, ints(frequency_axes(sections) * 2), ints(0))  # [d, B, T]
        return op.unsqueeze(op.transpose(per_frequency, ints([1, 2, 0])), ints([1]))

    def visible(self, layer: int) -> Handle:
        """A layer's additive attention mask `[B, 1, T, S]`; a padded query sees itself."""
        window = self._config.window(layer)
        if window not in self._masks:
            self._masks[window] = self._visible(window)
        return self._masks[window]

    def _visible(self, window: int | None) -> Handle:
        given = self.inputs["attention_mask"]
        rows, columns = self._steps
        seen, itself = op.less_equal(columns, rows), op.equal(columns, rows)
        tokens = op.convert(op.unsqueeze(given, ints([1, 2])), "boolean")
        if window is not None:
            near = op.greater(columns, op.add(rows, ints(-window)))
            if self._config.image_attention == "causal":
                return self._recognised(seen, near, op.logical_or(tokens, itself))
            seen = op.logical_and(seen, near)
        if self._config.image_attention == "bidirectional":
            seen = op.logical_or(seen, self._same_image)
        allowed = op.logical_or(op.logical_and(seen, tokens), itself)
        return op.select(allowed, scalar(0.0), scalar(MASKED)).output(0)

    def _recognised(self, seen: ov.Node, near: ov.Node, tokens: ov.Node) -> Handle:
        """The mask of what is all three, in a form from which paged attention reads the window.

        Paged attention drops every mask, and OpenVINO 2026.4 keeps the window of this one form
        alone (`gpt_oss_sliding_window_pattern`); other nodes would be silently left out.
        """
        allowed = op.bitwise_and(op.bitwise_and(seen, near), tokens)
        allowed = op.bitwise_and(op.bitwise_and(seen, allowed), seen)
        spread = op.broadcast(allowed, op.shape_of(allowed))
        mask = op.select(spread, scalar(0.0), scalar(MASKED)).output(0)
        return sliced(mask, ints([0]), self._total, 3)

    @cached_property
    def _total(self) -> Handle:
        """S, `[1]`."""
        return at(op.shape_of(self.inputs["attention_mask"]), 1)

    @cached_property
    def _steps(self) -> tuple[Handle, Handle]:
        """Columns of the attention mask: those of this call `[T, 1]`, and all `[1, S]`."""
        columns = op.range(ints(0), squeezed(self._total), ints(1), "i64")
        first = op.subtract(self._total, self.length)
        rows = op.range(squeezed(first), squeezed(self._total), ints(1), "i64")
        return op.unsqueeze(rows, ints([1])).output(0), op.unsqueeze(columns, ints([0])).output(0)

    @cached_property
    def _same_image(self) -> Handle:
        """Which keys are of the query's own image, boolean `[B, 1, T, S]`: no text between them."""
        text = op.subtract(scalar(1.0), self._image)
        number = op.multiply(op.add(op.cum_sum(text, ints(1)), scalar(1.0)), self._image)
        before = op.concat([ints([0]), op.subtract(self._total, self.length)], 0)
        keys = op.pad(number, before, ints([0, 0]), "constant", scalar(0.0))  # 0 for text
        queries = op.unsqueeze(number, ints([1, 3]))
        alike = op.equal(queries, op.unsqueeze(keys, ints([1, 2])))
        return op.logical_and(alike, op.greater(queries, scalar(0.5))).output(0)
