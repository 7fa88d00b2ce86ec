"""Constants of an OpenVINO graph that are no weights: sizes, axes and numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from openvino import opset15 as op

__all__ = ["ints", "scalar"]


def ints(value: int | Sequence[int]) -> Any:
    """An int64 constant, `[]` or `[N]`: an axis, a shape, a bound."""
    return op.constant(np.array(value, dtype=np.int64)).output(0)


def scalar(value: float) -> Any:
    """An fp32 constant `[]`."""
    return op.constant(np.array(value, dtype=np.float32)).output(0)
