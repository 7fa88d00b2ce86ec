"""How an ONNX graph cuts the T tokens of a call into n chunks of C = min(T, 64)."""

import functools

import numpy as np
from onnx import TensorProto

from edgekit.export.onnx_file import OnnxFile

__all__ = ["Chunks"]

CHUNK = 64


class Chunks:
    """What all chunked operators of a graph share; nothing is emitted before it is asked for."""

    def __init__(self, file: OnnxFile, time: str) -> None:
        """Cut `time`, T as int64 `[1]`."""
        self._file, self._time = file, time

    @functools.cached_property
    def shape(self) -> tuple[str, str]:
        """The numbers n and C, int64 `[1]`: n chunks of C tokens hold T."""
        node, constant = self._file.node, self._file.constant
        size = node("Min", [self._time, constant([CHUNK])], "chunk.size")
        more = node(
            "Sub", [node("Add", [self._time, size], "chunk.more"), constant([1])], "chunk.up"
        )
        return node("Div", [more, size], "chunk.count"), size

    @functools.cached_property
    def padding(self) -> str:
        """Pads of `[B, T, width]` up to whole chunks, int64 `[6]`."""
        count, size = self.shape
        whole = self._file.node("Mul", [count, size], "chunk.whole")
        missing = self._file.node("Sub", [whole, self._time], "chunk.missing")
        zeros, zero = self._file.constant([0, 0, 0, 0]), self._file.constant([0])
        return self._file.node("Concat", [zeros, missing, zero], "chunk.padding", axis=0)

    @functools.cached_property
    def lower(self) -> tuple[str, str, str]:
        """The lower triangle of `[C, C]` as bool and as fp32, and the middle row's index `[1]`."""
        node, constant = self._file.node, self._file.constant
        columns = self.steps(self.shape[1], "chunk.columns")
        rows = node("Unsqueeze", [columns, constant([1])], "chunk.rows")
        visible = node("LessOrEqual", [columns, rows], "chunk.visible")
        lower = node("Cast", [visible], "chunk.lower", to=TensorProto.FLOAT)
        return visible, lower, node("Div", [self.shape[1], constant([2])], "chunk.middle")

    def steps(self, count: str, name: str) -> str:
        """0 up to `count`, an int64 `[1]`."""
        start, step = (self._file.constant(np.asarray(n, np.int64), "steps") for n in (0, 1))
        end = self._file.node("Reshape", [count, self._file.constant([])], f"{name}.end")
        return self._file.node("Range", [start, end, step], name)
