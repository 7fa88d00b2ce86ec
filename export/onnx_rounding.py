"""Weights of a traced ONNX graph in fewer bits: stored narrow, widened by a node of the graph.

int8 has one scale per output channel, s = max|w| / 127. ONNX Runtime widens constants when it
loads the graph, so this saves space on disk, not time.
"""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["narrow_weights"]

Float = NDArray[np.float32]
SMALLEST = 4096  # numbers; fewer keep their precision
# The axis of a weight that counts output channels, by operator and place among its inputs.
CHANNELS = {("MatMul", 1): 1, ("Gemm", 1): 0, ("Conv", 1): 0}


def narrow_weights(path: Path, weights_format: str) -> None:
    """Rewrite an ONNX file with its large weights in 16 or 8 bits.

    Args:
        path: the file; its weights lie inside it.
        weights_format: `fp16`; anything else means int8.
    """
    model = onnx.load(path)
    graph = model.graph
    axes = _axes(graph)
    kept, narrowed, widening = [], [], []
    for tensor in graph.initializer:
        if tensor.name not in axes or np.prod(tensor.dims) < SMALLEST:
            kept.append(tensor)
            continue
        values = numpy_helper.to_array(tensor)
        make = _half if weights_format == "fp16" else _int8
        stored, node = make(tensor.name, values, axes[tensor.name])
        narrowed += stored
        widening.append(node)
    del graph.initializer[:]
    graph.initializer.extend([*kept, *narrowed])
    nodes = [*widening, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    path.write_bytes(model.SerializeToString())


def _axes(graph: onnx.GraphProto) -> dict[str, int]:
    """The axis of output channels of every fp32 initializer that is a weight."""
    floats = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    found = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            axis = CHANNELS.get((node.op_type, place))
            if axis is not None and name in floats:
                found[name] = _gemm_axis(node) if node.op_type == "Gemm" else axis
    return found


def _gemm_axis(node: onnx.NodeProto) -> int:
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if transposed else 1


def _half(name: str, values: Float, axis: int) -> tuple[list[TensorProto], onnx.NodeProto]:
    stored = numpy_helper.from_array(values.astype(np.float16), f"{name}.half")
    return [stored], helper.make_node("Cast", [stored.name], [name], to=TensorProto.FLOAT)


def _int8(name: str, values: Float, axis: int) -> tuple[list[TensorProto], onnx.NodeProto]:
    others = tuple(i for i in range(values.ndim) if i != axis)
    scales = np.abs(values).max(axis=others, keepdims=True) / np.float32(127)
    q = np.rint(np.divide(values, scales, out=np.zeros_like(values), where=scales != 0))
    stored = [
        numpy_helper.from_array(q.astype(np.int8), f"{name}.q"),
        numpy_helper.from_array(scales.reshape(-1).astype(np.float32), f"{name}.scales"),
    ]
    names = [tensor.name for tensor in stored]
    return stored, helper.make_node("DequantizeLinear", names, [name], axis=axis)
