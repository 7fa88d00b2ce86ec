"""SPIN as ONNX nodes: heads turned down by how far they look at the image.

Score `mass`: the share of a head's weight that image tokens have is what it returns in the value
column that is 1 on them. Fused attention wants queries, keys and values of one width, so the
columns that values gain are zero in the others, where they change no product. Score `logit`: a
head's logits on the image sum up to the product of its query with the sum of the image keys, a
small state, and attention stays as it is. `kernels/head_gate/reference.py` has both, and the rule.
B batch, T tokens of this call, H query heads, S KV heads, d head width.
"""

import functools
from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from edgekit.bundle import IMAGE_MASS
from edgekit.export.onnx_file import OnnxFile
from edgekit.export.states import IMAGE_MASK
from edgekit.kernels.head_gate.reference import SEEN
from edgekit.models.config import INDICATOR_COLUMNS, DecoderConfig
from edgekit.models.spin import SpinConfig

__all__ = ["HeadGateWriter"]

END = np.iinfo(np.int64).max  # of a slice


class HeadGateWriter:
    """Adds SPIN layer by layer; what the layers share is emitted once."""

    def __init__(
        self, file: OnnxFile, config: DecoderConfig, time: str, mask: Callable[[], str]
    ) -> None:
        """Declare the input `spin_image_mask`.

        Args:
            file: the graph's.
            config: with SPIN.
            time: T, int64 `[1]`.
            mask: emits 1 for the tokens of this call, 0 for padding, fp32 `[B, T, 1]`.
        """
        assert config.spin is not None
        self._file, self._config, self._time, self._mask = file, config, time, mask
        self._spin: SpinConfig = config.spin
        self._masses: list[str] = []  # of the last position, [B, H, 1] of each gated layer so far
        file.input(IMAGE_MASK, TensorProto.INT64, ["batch", "image_time"])

    def widened(self, x: str, name: str) -> str:
        """Queries or keys `[B, T, heads d]` with zero columns, `[B, T, heads w]`."""
        heads = self._apart(x, name)
        pads = self._file.constant([0] * 7 + [INDICATOR_COLUMNS])
        return self._joined(self._file.node("Pad", [heads, pads], f"{name}.wide"), name)

    def marked(self, v: str, name: str) -> str:
        """Values `[B, T, heads d]` with indicator columns, `[B, T, heads w]`."""
        heads = self._apart(v, name)
        wide = self._file.node("Concat", [heads, self._indicator], f"{name}.wide", axis=3)
        return self._joined(wide, name)

    def marked_columns(self, v: str, name: str) -> str:
        """Value columns of LAWCAT `[B, T, heads V]` with the indicator after the normaliser."""
        return self._file.node("Add", [v, self._indicator_columns], f"{name}.marked")

    def narrowed(self, y: str, name: str) -> str:
        """What attention made of wide heads, `[B, T, H w]`, gated and as wide as before."""
        heads, d = self._config.num_heads, self._config.head_dim
        shape = self._file.constant([0, 0, heads, -1])
        apart = self._file.node("Reshape", [y, shape], f"{name}.wide_heads")
        sizes = self._file.constant([d, 1, INDICATOR_COLUMNS - 1])
        y, mass, _ = self._file.nodes("Split", [apart, sizes], f"{name}.mass", 3, axis=-1)
        return self._joined(self.gated(y, mass, name), f"{name}.narrow")

    def gated_by_sums(self, y: str, q: str, k: str, states: tuple[str, str], name: str) -> str:
        """Heads `[B, T, H d]`, alike, turned down by the sum of their logits on the image.

        Args:
            y: the heads.
            q: rotated queries `[B, T, H d]`.
            k: rotated keys `[B, T, S d]`.
            states: names of the state before the call and of that after it, `[B, S, d + 1]`.
            name: of the attention.
        """
        node = functools.partial(self._file.node, name=f"{name}.logits")
        constant, config = self._file.constant, self._config
        heads, owners, d = config.num_heads, config.num_kv_heads, config.head_dim
        sums = self._summed(k, states, name)
        apart = node("Reshape", [sums, constant([0, 0, owners, 1, d + 1])])
        sizes = constant([d, 1])
        keys, number = self._file.nodes("Split", [apart, sizes], f"{name}.number", 2, axis=-1)
        queries = node("Reshape", [q, constant([0, 0, owners, config.groups, d])])
        products = node("Mul", [queries, keys])
        logits = node("ReduceSum", [products, constant([4])], keepdims=0)
        logits = node("Reshape", [logits, constant([0, 0, heads, 1])])
        first = constant(np.asarray(0, np.int64), "steps")
        half = constant(np.float32(0.5), "half")
        sees = node("Greater", [node("Gather", [number, first], axis=2), half])
        gated = self.gated(self._apart(y, f"{name}.y"), logits, name, sees)
        return self._joined(gated, f"{name}.gated")

    def _summed(self, k: str, states: tuple[str, str], name: str) -> str:
        """Image keys that each query has seen, summed, and their number, `[B, T or 1, S (d + 1)]`.

        The last row is the state after the call.
        """
        node = functools.partial(self._file.node, name=f"{name}.sums")
        constant, heads = self._file.constant, self._config.num_kv_heads
        pads, one = constant([0] * 7 + [1]), constant(np.float32(1), "spin.one")
        keys = node("Mul", [node("Pad", [self._apart(k, name), pads, one]), self._counted])
        flat = node("Reshape", [keys, constant([0, 0, heads * (self._config.head_dim + 1)])])
        if self._spin.queries == "last":
            now = node("ReduceSum", [flat, constant([1])], keepdims=1)
        else:
            now = node("CumSum", [flat, constant(np.asarray(1, np.int64), "steps")])
        sums = node("Add", [now, node("Reshape", [states[0], constant([0, 1, -1])])])
        last = node("Gather", [sums, constant(np.asarray(-1, np.int64), "spin.end_row")], axis=1)
        after = constant([0, heads, -1])
        self._file.nodes("Reshape", [last, after], f"{name}.sums_after", [states[1]])
        return sums

    def gated(self, y: str, scores: str, name: str, sees: str | None = None) -> str:
        """Heads `[B, T, H, d]`, turned down where their scores ask for it.

        Args:
            y: the heads.
            scores: how far each looks at the image, `[B, T, H, 1]`.
            name: of the attention.
            sees: whether a query sees an image, bool `[B, T or 1, 1, 1]`; None: the scores are
                masses, and say so.
        """
        node = functools.partial(self._file.node, name=f"{name}.spin")
        if self._config.spin_scores:
            end = self._file.constant(np.asarray(-1, np.int64), "spin.end_row")
            last = self._file.node("Gather", [scores, end], f"{name}.last_mass", axis=1)
            self._masses.append(last)
        if self._spin.inert(self._config.num_heads):
            return y
        choose = self._by_topk if self._spin.lowering == "topk" else self._by_rank
        chosen = choose(scores, name)
        sees = self._sees(scores, name) if sees is None else sees
        gate = self._file.node("And", [sees, self._queries], f"{name}.gate")
        spared = node("Or", [chosen, node("Not", [gate])])
        values = [self._file.constant(np.float32(x), "spin.factor") for x in (1, self._spin.alpha)]
        return node("Mul", [y, node("Where", [spared, *values])])

    def write_image_mass(self) -> None:
        """Add the output `image_mass`, fp32 `[B, 1]`: the mean over gated layers and heads."""
        self._file.output(IMAGE_MASS, TensorProto.FLOAT, ["batch", 1])
        joined = self._file.node("Concat", self._masses, f"{IMAGE_MASS}.heads", axis=1)
        axes = self._file.constant([1])
        self._file.nodes("ReduceMean", [joined, axes], IMAGE_MASS, [IMAGE_MASS], keepdims=0)

    def _by_topk(self, scores: str, name: str) -> str:
        """The heads of each query with the largest scores, bool `[B, T, H, 1]`."""
        node = functools.partial(self._file.node, name=f"{name}.topk")
        kept = self._spin.kept(self._config.num_heads)
        _, order = self._file.nodes(
            "TopK", [scores, self._file.constant([kept])], f"{name}.topk", 2, axis=2
        )
        one = self._file.constant(np.float32(1), "spin.one")
        zeros = node("Mul", [scores, self._file.constant(np.float32(0), "zero")])
        ones = node("Expand", [one, node("Shape", [order])])
        marks = node("ScatterElements", [zeros, order, ones], axis=2)
        return node("Greater", [marks, self._file.constant(np.float32(0.5), "half")])

    def _by_rank(self, scores: str, name: str) -> str:
        """The same by counting the heads that are ahead: for devices without a quick TopK."""
        node, constant = (
            functools.partial(self._file.node, name=f"{name}.rank"),
            self._file.constant,
        )
        mine = node("Unsqueeze", [scores, constant([3])])  # [B, T, H, 1, 1]
        other = node("Unsqueeze", [scores, constant([2])])  # [B, T, 1, H, 1]
        order = np.arange(self._config.num_heads)
        earlier = constant((order < order[:, None])[None, None, ..., None], "spin.earlier")
        ties = node("And", [node("Equal", [other, mine]), earlier])
        ahead = node("Or", [node("Greater", [other, mine]), ties])
        number = node("Cast", [ahead], to=TensorProto.FLOAT)
        count = node("ReduceSum", [number, constant([3])], keepdims=0)
        kept = constant(np.float32(self._spin.kept(self._config.num_heads)), "spin.kept")
        return node("Less", [count, kept])

    def _sees(self, mass: str, name: str) -> str:
        """Whether a query sees an image, bool `[B, T, 1, 1]`."""
        node, constant = self._file.node, self._file.constant
        seen = constant(np.float32(SEEN), "spin.seen")
        total = node("ReduceSum", [mass, constant([2])], f"{name}.total", keepdims=1)
        return node("Greater", [total, seen], f"{name}.sees")

    @functools.cached_property
    def _counted(self) -> str:
        """1 on the image tokens of this call that are no padding, else 0, fp32 `[B, T, 1, 1]`."""
        node, constant = self._file.node, self._file.constant
        tokens = node("Unsqueeze", [self._mask(), constant([3])], "spin.tokens")
        return node("Mul", [self._image, tokens], "spin.counted")

    @functools.cached_property
    def _queries(self) -> str:
        """The queries that may be gated, bool `[B or 1, T, 1, 1]`."""
        node, constant = self._file.node, self._file.constant
        if self._spin.queries == "text":
            half = constant(np.float32(0.5), "half")
            return node("Less", [self._image, half], "spin.text")
        zero, one = (constant(np.asarray(n, np.int64), "steps") for n in (0, 1))
        end = node("Reshape", [self._time, constant([])], "spin.end")
        steps = node("Range", [zero, end, one], "spin.steps")
        last = node("Equal", [steps, node("Sub", [end, one], "spin.last")], "spin.is_last")
        return node("Unsqueeze", [last, constant([0, 2, 3])], "spin.queries")

    @functools.cached_property
    def _image(self) -> str:
        """1 on the image tokens of this call, else 0, fp32 `[B, T, 1, 1]`.

        A caller may give the mask of all tokens so far.
        """
        node, constant = self._file.node, self._file.constant
        start = node("Neg", [self._time], "spin.start")
        recent = node("Slice", [IMAGE_MASK, start, constant([END]), constant([1])], "spin.recent")
        number = node("Cast", [recent], "spin.number", to=TensorProto.FLOAT)
        return node("Unsqueeze", [number, constant([2, 3])], "spin.image")

    @functools.cached_property
    def _indicator(self) -> str:
        """The same for every head of the values, `[B, T, heads, columns]`."""
        sizes = self._file.constant([1, 1, self._config.num_kv_heads, INDICATOR_COLUMNS])
        return self._file.node("Expand", [self._image, sizes], "spin.indicator")

    @functools.cached_property
    def _indicator_columns(self) -> str:
        """The same among the value columns of LAWCAT's state heads, `[B, T, heads V]`."""
        pattern = np.zeros((self._config.state_heads, self._config.value_columns), np.float32)
        pattern[:, self._config.head_dim + 1] = 1.0
        flat = self._file.constant(pattern.reshape(1, 1, -1), "spin.pattern")
        image = self._file.node("Squeeze", [self._image, self._file.constant([3])], "spin.rows")
        return self._file.node("Mul", [image, flat], "spin.columns")

    def _apart(self, x: str, name: str) -> str:
        shape = self._file.constant([0, 0, -1, self._config.head_dim])
        return self._file.node("Reshape", [x, shape], f"{name}.apart")

    def _joined(self, x: str, name: str) -> str:
        """The last two axes as one, however many heads there are."""
        rows = self._file.node("Shape", [x], f"{name}.rows", end=2)
        shape = self._file.node("Concat", [rows, self._file.constant([-1])], f"{name}.flat", axis=0)
        return self._file.node("Reshape", [x, shape], f"{name}.joined")
