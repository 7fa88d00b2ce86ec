"""Small pieces of an OpenVINO graph: constants that are no weights, inputs, slices, names."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

__all__ = ["at", "ints", "named", "parameter", "scalar", "sliced", "squeezed"]


def ints(value: int | Sequence[int]) -> Any:
    """An int64 constant, `[]` or `[N]`: an axis, a shape, a bound."""
    return op.constant(np.array(value, dtype=np.int64)).output(0)


def scalar(value: float) -> Any:
    """An fp32 constant `[]`."""
    return op.constant(np.array(value, dtype=np.float32)).output(0)


def parameter(name: str, shape: Sequence[int], kind: ov.Type) -> ov.op.Parameter:
    """A graph input."""
    node = ov.op.Parameter(kind, ov.PartialShape(list(shape)))
    node.set_friendly_name(name)
    node.get_output_tensor(0).set_names({name})
    return node


def named(node: ov.Node, name: str) -> Any:
    """The only output of `node`, which gets its friendly name."""
    node.set_friendly_name(name)
    return node.output(0)


def at(shape: ov.Node, index: int) -> Any:
    """One entry of a shape, as `[1]`."""
    return op.gather(shape, ints([index]), ints(0)).output(0)


def squeezed(x: Any) -> Any:
    """A scalar out of `[1]`."""
    return op.squeeze(x, ints([0])).output(0)


def sliced(x: Any, start: Any, stop: Any | None, axis: int) -> Any:
    """`x[start:stop]` along `axis`; bounds are `[1]`, None is the end."""
    end = ints([np.iinfo(np.int64).max]) if stop is None else stop
    return op.slice(x, start, end, ints([1]), ints([axis])).output(0)
