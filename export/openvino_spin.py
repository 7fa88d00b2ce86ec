"""SPIN as OpenVINO nodes: heads turned down by the share of their weight that image tokens have.

That share is what a head returns in the value column that is 1 on image tokens
(`kernels/head_gate/reference.py` has the rule). The column joins the values before the cache, so
that attention stays one fused node. B batch, H query heads, T tokens of this call, d head width.
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
    """

    spin: SpinConfig
    image: Handle
    length: Handle

    def marked(self, v: Handle, columns: int) -> Handle:
        """Values `[B, heads, T, d]` with the indicator as `columns` more, `[B, heads, T, .]`."""
        indicator = op.unsqueeze(self.image, ints([1, 3]))
        sizes = op.shape_of(v)
        shape = op.concat([op.gather(sizes, ints([0, 1, 2]), ints(0)), ints([columns])], 0)
        return op.concat([v, op.broadcast(indicator, shape, broadcast_spec="BIDIRECTIONAL")], 3)

    def gated(self, y: Handle, mass: Handle) -> Handle:
        """Heads `[B, H, T, d]`, turned down where their `mass [B, H, T, 1]` asks for it."""
        heads = int(mass.get_partial_shape()[1].get_length())
        kept = self.spin.kept(heads)
        chosen = _by_topk if self.spin.lowering == "topk" else _by_rank
        spared = op.logical_or(chosen(mass, heads, kept), op.logical_not(self._gate(mass)))
        factor = op.select(spared, scalar(1.0), scalar(self.spin.alpha))
        return op.multiply(y, factor).output(0)

    def _gate(self, mass: Handle) -> ov.Node:
        """The queries whose heads are turned down, boolean `[B, 1, T, 1]`."""
        sees = op.greater(op.reduce_sum(mass, ints([1]), True), scalar(SEEN))
        if self.spin.queries == "text":
            text = op.less(op.unsqueeze(self.image, ints([1, 3])), scalar(0.5))
            return op.logical_and(sees, text)
        time = op.gather(op.shape_of(self.image), ints(1), ints(0))
        steps = op.range(ints(0), time, ints(1), "i64")
        last = op.equal(steps, op.subtract(self.length, ints([1])))
        return op.logical_and(sees, op.unsqueeze(last, ints([0, 1, 3])))


def _by_topk(mass: Handle, heads: int, kept: int) -> ov.Node:
    """The `kept` largest of each query, boolean `[B, H, T, 1]`, by TopK and a scatter."""
    order = op.topk(mass, ints(kept), 1, "max", "value", "i64", True).output(1)
    none = op.multiply(mass, scalar(0.0))
    ones = op.add(op.multiply(sliced(mass, ints([0]), ints([kept]), 1), scalar(0.0)), scalar(1.0))
    return op.greater(op.scatter_elements_update(none, order, ones, ints(1)), scalar(0.5))


def _by_rank(mass: Handle, heads: int, kept: int) -> ov.Node:
    """The same by counting the heads that are ahead: for devices without a quick TopK."""
    mine, other = op.unsqueeze(mass, ints([2])), op.unsqueeze(mass, ints([1]))  # [B, H, H, T, 1]
    order = np.arange(heads)
    earlier = op.constant((order < order[:, None])[None, :, :, None, None])
    ties = op.logical_and(op.equal(other, mine), earlier)
    ahead = op.convert(op.logical_or(op.greater(other, mine), ties), "f32")
    return op.less(op.reduce_sum(ahead, ints([2]), False), scalar(float(kept)))
