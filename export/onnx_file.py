"""An ONNX model under construction: nodes in memory, weights streamed to a data file beside it.

A weight is appended to the data file as soon as it is given and only its place is remembered,
so the memory needed is that of one tensor. Small constants stay inside the protobuf, where shape
inference sees them.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

__all__ = ["CONTRIB", "OnnxFile"]

CONTRIB = "com.microsoft"
OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
INLINE_BYTES = 1024
ALIGN, PAGE = 64, 4096
Array = NDArray[Any]


class OnnxFile:
    """Writes `{directory}/{name}` and `{directory}/{name}.data`; use it in a `with` block.

    Attributes:
        metadata: what the model says of itself, by key.

    Example:
        >>> with OnnxFile(out) as file:                                    # doctest: +SKIP
        ...     file.input("x", TensorProto.FLOAT, ["batch", 4])
        ...     y = file.output("y", TensorProto.FLOAT, ["batch", 4])
        ...     file.nodes("Mul", ["x", file.constant(np.float32(2))], "double", [y])
    """

    def __init__(self, directory: Path, name: str = "model.onnx") -> None:
        """Create the data file in `directory`, which must exist."""
        self._path = directory / name
        self._data = (directory / f"{name}.data").open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._names: set[str] = set()
        self.metadata: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._data.close()
        if error is None:
            self._save()

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input; a string in `shape` names a dynamic axis."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def optional_input(
        self, name: str, default: Array, shape: Sequence[int | str] | None = None
    ) -> str:
        """Declare a graph input that callers may leave out: an initialiser of the same name.

        `shape` names the dynamic axes; None: the default's.
        """
        tensor = onnx.numpy_helper.from_array(default, name)
        self._tensors[name] = tensor
        return self.input(name, tensor.data_type, default.shape if shape is None else shape)

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """Declare a graph output that a later node names as its own."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def rename_output(self, value: str, name: str) -> None:
        """Give `value`, which nothing reads, the name of a declared graph output."""
        for node in reversed(self._nodes):
            if value in node.output:
                node.output[list(node.output).index(value)] = name
                return
        raise KeyError(value)

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add an operator with one output; returns the output's name.

        Args:
            op: its type; `com.microsoft.X` for a contrib operator.
            inputs: names of values, "" for an absent one.
            name: module path and role, made unique.
            attributes: the operator's attributes.
        """
        return self.nodes(op, inputs, name, 1, **attributes)[0]

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        outputs: int | Sequence[str],
        **attributes: Any,
    ) -> list[str]:
        """Add an operator with several outputs.

        `outputs` is their number or their names: "" skips one, "*" is named here.
        """
        unique = self._unique(name)
        if isinstance(outputs, int):
            outputs = [f"{unique}/out{i}" if i else f"{unique}/out" for i in range(outputs)]
        outputs = [f"{unique}/out{i}" if o == "*" else o for i, o in enumerate(outputs)]
        domain, _, kind = op.rpartition(".")
        node = helper.make_node(kind, inputs, outputs, unique, domain=domain, **attributes)
        self._nodes.append(node)
        return list(outputs)

    def constant(self, value: Array | np.generic | Sequence[int], name: str = "constant") -> str:
        """A constant tensor; a sequence of ints becomes int64 `[n]`. Equal constants are shared."""
        array = np.asarray(value, np.int64 if isinstance(value, list | tuple) else None)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(self._unique(name), array)
        return self._constants[key]

    def weight(
        self, name: str, array: Array, kind: int | None = None, shape: Sequence[int] | None = None
    ) -> str:
        """Store a tensor under `name`.

        Args:
            name: unique in the file.
            array: its data, exactly as it lies in memory.
            kind: ONNX type where it differs from the array's, such as packed INT4.
            shape: likewise.
        """
        kind = helper.np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
        shape = array.shape if shape is None else shape
        tensor = TensorProto(name=name, data_type=kind, dims=shape)
        if array.nbytes <= INLINE_BYTES:
            tensor.raw_data = array.tobytes()
        else:
            self._append(tensor, np.ascontiguousarray(array))
        self._tensors[name] = tensor
        return name

    def alias(self, name: str, of: str, shape: Sequence[int]) -> str:
        """The stored tensor `of` under another name and shape, without storing it twice."""
        tensor = TensorProto()
        tensor.CopyFrom(self._tensors[of])
        tensor.name = name
        tensor.dims[:] = shape
        self._tensors[name] = tensor
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return tuple(self._tensors[name].dims)

    def _append(self, tensor: TensorProto, array: Array) -> None:
        align = PAGE if array.nbytes >= PAGE else ALIGN
        self._data.write(b"\0" * (-self._data.tell() % align))
        place = {
            "location": f"{self._path.name}.data",
            "offset": str(self._data.tell()),
            "length": str(array.nbytes),
        }
        self._data.write(array.reshape(-1).view(np.uint8).data)  # tofile can lose a tail unsaid
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)

    def _unique(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self._names:
            n += 1
            candidate = f"{name}_{n}"
        self._names.add(candidate)
        return candidate

    def _save(self) -> None:
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._tensors.values())
        )
        domains = {node.domain for node in self._nodes}
        opsets = [helper.make_opsetid("", OPSET)]
        if CONTRIB in domains:
            opsets.append(helper.make_opsetid(CONTRIB, CONTRIB_OPSET))
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgekit"
        )
        helper.set_model_props(model, self.metadata)
        self._path.write_bytes(model.SerializeToString())
