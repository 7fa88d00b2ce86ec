"""Side paths as OpenVINO nodes.

A slot is y + ((x A^T) * alpha) B^T with A, alpha and B as variables, the form that OpenVINO GenAI
adds and that the plug-ins fuse into one LoRA operation; with rank 0, y itself. (Without alpha the
CPU plug-in of OpenVINO 2026.4 cannot compile it: it takes A for the weight of a dense layer.)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from edgekit.artefacts.lowrank import LowRank
from edgekit.export.openvino_values import named
from edgekit.export.side_paths import SidePaths

__all__ = ["sided"]

Handle = Any  # an openvino.Output: the package ships no types


def sided(y: Handle, x: Handle, module: str, side: SidePaths) -> tuple[Handle, list[ov.Node]]:
    """A module's product with its side paths.

    Args:
        y: the product `[.., out]`.
        x: its input `[.., in]`.
        module: whose product it is.
        side: all side paths.

    Returns:
        The sum, and the sinks that declare the variables `adapter.{module}.a [r, in]`, `.alpha
        [1, r]` and `.b [out, r]` of a slot.
    """
    sinks: list[ov.Node] = []
    if module in side.slots:  # first, as the plug-ins fuse it with the product only
        y, sinks = _slot(y, x, module)
    if module in side.constant:
        y = _constant_path(y, x, side.constant[module], module)
    return y, sinks


def _slot(y: Handle, x: Handle, module: str) -> tuple[Handle, list[ov.Node]]:
    out, width = (h.get_partial_shape()[2].get_length() for h in (y, x))
    a, alpha, b = (
        _variable(f"adapter.{module}.{part}", sizes)
        for part, sizes in (("a", [-1, width]), ("alpha", [1, -1]), ("b", [out, -1]))
    )
    inner = op.multiply(op.matmul(x, a, False, True), alpha)
    total = op.add(y, op.matmul(inner, b, False, True))
    sinks = [op.assign(node, node.get_friendly_name()) for node in (a, alpha, b)]
    return named(total, f"{module}.lora_add"), sinks


def _constant_path(y: Handle, x: Handle, pair: LowRank, module: str) -> Handle:
    """B (A x) in fp32, under names that compression knows."""
    a, b = (
        named(op.constant(matrix.float().numpy()), f"{module}.lora_{part}")
        for part, matrix in (("A", pair.a), ("B", pair.b))
    )
    inner = named(op.matmul(x, a, False, True), f"{module}.lora_down")
    outer = named(op.matmul(inner, b, False, True), f"{module}.lora_up")
    return named(op.add(y, outer), f"{module}.lora_add")


def _variable(name: str, shape: Sequence[int]) -> ov.Node:
    """A variable whose growing size, -1, is 0 at first."""
    empty = op.constant(np.zeros([max(size, 0) for size in shape], np.float32))
    node = op.read_value(empty, name, ov.Type.f32, ov.PartialShape(list(shape)))
    node.set_friendly_name(name)
    return node
