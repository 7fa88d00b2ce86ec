"""SPIN as OpenVINO nodes: heads turned down by how far they look at the image.

Score `mass`: the share of a head's weight that image tokens have is what it returns in the value
column that is 1 on them. Score `logit`: its logits on the image sum up to the product of its query
with the sum of the image keys, a small state (`kernels/head_gate/reference.py` has both, and the
rule). The column joins the values, and the sum reads the keys, before the cache: a third reader of
the cache would break the fusion of attention into one node. B batch, H query heads, S KV heads, T
tokens of this call, d head width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from edgekit.export.openvino_values import ints, scalar, sliced
from edgekit.kernels.head_gate.reference import SEEN
from edgekit.models.spin import SpinConfig

__all__ = ["HeadGate"]

Handle = Any  # an openvino.Output: the package ships no types


@dataclass(frozen=True, slots=True)
class HeadGate:
    """What the gated layers of a call share.

    Attributes:
        spin: the rule.
        image: 1 on the image tokens of this call, else 0, fp32 `[B, T]`.
        length: how many of the T are tokens; the rest is padding on the right, `[1]`.
        masses: of the last token, `[B, H, 1, 1]` of each gated layer so far; None: nobody asks.
    """

    spin: SpinConfig
    image: Handle
    length: Handle
    masses: list[Handle] | None = None

    def marked(self, v: Handle, columns: int) -> Handle:
        """Values `[B, heads, T, d]` with the indicator as `columns` more, `[B, heads, T, .]`."""
        indicator = op.unsqueeze(self.image, ints([1, 3]))
        sizes = op.shape_of(v)
        shape = op.concat([op.gather(sizes, ints([0, 1, 2]), ints(0)), ints([columns])], 0)
        return op.concat([v, op.broadcast(indicator, shape, broadcast_spec="BIDIRECTIONAL")], 3)

    def summed(self, k: Handle, counted: Handle, past: Handle) -> Handle:
        """Image keys that each query has seen, summed, and their number, `[B, S, T or 1, d + 1]`.

        CumSum is linear in T. A product with a triangle is slower from T = 256 on, and one in
        blocks takes twice as long at T = 1 for little gain beyond.

        Args:
            k: rotated keys of this call, `[B, S, T, d]`.
            counted: `Call.counted`.
            past: the state, the last row of what this returned in the call before, `[B, S, d + 1]`.
        """
        ones = op.pad(k, ints([0] * 4), ints([0, 0, 0, 1]), "constant", scalar(1.0))
        keys = op.multiply(ones, counted)
        if self.spin.queries == "last":
            now = op.reduce_sum(keys, ints([2]), True)
        else:
            now = op.cum_sum(keys, ints(2))
        return op.add(now, op.unsqueeze(past, ints([2]))).output(0)

    def gated_by_sums(self, y: Handle, q: Handle, sums: Handle) -> Handle:
        """Heads `[B, H, T, d]` of queries `q`, alike, turned down by what `summed` returned."""
        (_, heads, _, d), states = q.get_partial_shape(), sums.get_partial_shape()[1].get_length()
        apart = ints([0, states, heads.get_length() // states, -1, d.get_length()])
        end = ints([d.get_length()])
        keys = op.unsqueeze(sliced(sums, ints([0]), end, 3), ints([2]))
        products = op.multiply(op.reshape(q, apart, True), keys)
        logits = op.reduce_sum(products, ints([4]), False)
        logits = op.reshape(logits, ints([0, heads.get_length(), -1, 1]), True).output(0)
        number = op.gather(sliced(sums, end, None, 3), ints([0]), ints(1))
        return self.gated(y, logits, op.greater(number, scalar(0.5)))

    def gated(self, y: Handle, scores: Handle, sees: ov.Node | None = None) -> Handle:
        """Heads `[B, H, T, d]`, turned down where their scores ask for it.

        Args:
            y: the heads.
            scores: how far each looks at the image, `[B, H, T, 1]`.
            sees: whether a query sees an image, boolean `[B, 1, T or 1, 1]`; None: the scores are
                masses, and say so.
        """
        heads = int(scores.get_partial_shape()[1].get_length())
        if self.masses is not None:
            last = op.subtract(self.length, ints([1]))
            self.masses.append(op.gather(scores, last, ints(2)).output(0))
        if self.spin.inert(heads):
            return y
        kept = self.spin.kept(heads)
        chosen = _by_topk if self.spin.lowering == "topk" else _by_rank
        if sees is None:
            sees = op.greater(op.reduce_sum(scores, ints([1]), True), scalar(SEEN))
        gate = op.logical_and(sees, self._queries())
        spared = op.logical_or(chosen(scores, heads, kept), op.logical_not(gate))
        factor = op.select(spared, scalar(1.0), scalar(self.spin.alpha))
        return op.multiply(y, factor).output(0)

    def image_mass(self) -> Handle:
        """The mean of all masses of the last token, fp32 `[B, 1]`; call once, after all layers."""
        assert self.masses
        joined = self.masses[0] if len(self.masses) == 1 else op.concat(self.masses, 1)
        return op.reduce_mean(joined, ints([1, 2]), False).output(0)

    def _queries(self) -> ov.Node:
        """The queries that may be gated, boolean `[B or 1, 1, T, 1]`."""
        if self.spin.queries == "text":
            return op.less(op.unsqueeze(self.image, ints([1, 3])), scalar(0.5))
        time = op.gather(op.shape_of(self.image), ints(1), ints(0))
        steps = op.range(ints(0), time, ints(1), "i64")
        last = op.equal(steps, op.subtract(self.length, ints([1])))
        return op.unsqueeze(last, ints([0, 1, 3]))


def _by_topk(scores: Handle, heads: int, kept: int) -> ov.Node:
    """The `kept` largest of each query, boolean `[B, H, T, 1]`, by TopK and a scatter."""
    order = op.topk(scores, ints(kept), 1, "max", "value", "i64", True).output(1)
    none = op.multiply(scores, scalar(0.0))
    ones = op.add(op.multiply(sliced(scores, ints([0]), ints([kept]), 1), scalar(0.0)), scalar(1.0))
    return op.greater(op.scatter_elements_update(none, order, ones, ints(1)), scalar(0.5))


def _by_rank(scores: Handle, heads: int, kept: int) -> ov.Node:
    """The same by counting the heads that are ahead: for devices without a quick TopK."""
    mine = op.unsqueeze(scores, ints([2]))  # [B, H, 1, T, 1]
    other = op.unsqueeze(scores, ints([1]))  # [B, 1, H, T, 1]
    order = np.arange(heads)
    earlier = op.constant((order < order[:, None])[None, :, :, None, None])
    ties = op.logical_and(op.equal(other, mine), earlier)
    ahead = op.convert(op.logical_or(op.greater(other, mine), ties), "f32")
    return op.less(op.reduce_sum(ahead, ints([2]), False), scalar(float(kept)))
