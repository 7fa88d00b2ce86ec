"""How many bytes of weights a decoding step must read, by the graph itself.

A weight that is only looked up in counts nothing, as a step reads one row of it: a token table that
the head does not share, or the sines and cosines of positions.
"""

import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from edgekit.errors import EngineError

__all__ = ["weight_bytes"]

# Between an OpenVINO weight and what reads it, where it is stored in few bits.
DECOMPRESSION = ("Convert", "Multiply", "Reshape", "Subtract")
LOOKUPS = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")


def weight_bytes(graph: Path) -> int:
    """The bytes of a graph's constants that a step reads, as they are stored.

    Args:
        graph: an OpenVINO IR (`.xml`) or an ONNX file.

    Raises:
        EngineError: if the package that reads it is not installed.
    """
    name, package, count = READERS[graph.suffix]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as cause:
        raise EngineError(
            f"{graph.name}: counting its weights needs {name}, which is not installed; "
            f"pip install {package}"
        ) from cause
    return count(module, graph)


def _openvino_bytes(ov: Any, graph: Path) -> int:
    constants = (op for op in ov.Core().read_model(graph).get_ops() if _is_weight(op))
    return sum(op.get_byte_size() for op in constants)


def _is_weight(op: Any) -> bool:
    return op.get_type_name() == "Constant" and not _only_looked_up(op)


def _only_looked_up(op: Any) -> bool:
    """Whether every way on from here leads to a lookup."""
    readers = [port.get_node() for port in op.output(0).get_target_inputs()]
    return all(
        reader.get_type_name() in LOOKUPS
        or (reader.get_type_name() in DECOMPRESSION and _only_looked_up(reader))
        for reader in readers
    )


def _onnx_bytes(onnx: Any, file: Path) -> int:
    graph = onnx.load(file, load_external_data=False).graph
    readers = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    return sum(
        _stored_bytes(tensor)
        for tensor in graph.initializer
        if not readers[tensor.name] <= set(LOOKUPS)
    )


def _stored_bytes(tensor: Any) -> int:
    """In the file of external data, or in the model's own."""
    lengths = (int(entry.value) for entry in tensor.external_data if entry.key == "length")
    return next(lengths, tensor.ByteSize())


READERS = {
    ".xml": ("openvino", "openvino", _openvino_bytes),
    ".onnx": ("onnx", "onnx", _onnx_bytes),
}
