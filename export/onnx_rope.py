"""Rotary position embeddings in ONNX: the input, and tables where no operator rotates by itself."""

import numpy as np
from onnx import TensorProto

from edgekit.export.onnx_file import OnnxFile
from edgekit.export.states import POSITIONS
from edgekit.models.config import RopeConfig
from edgekit.models.rope import frequency_axes, inverse_frequencies

__all__ = ["RopeTables", "declare_positions"]


def declare_positions(file: OnnxFile, rope: RopeConfig) -> None:
    """Add the input `position_ids`, `[B, T]`, or time, height and width `[3, B, T]`."""
    axes: list[int | str] = [] if rope.mrope_section is None else [3]
    file.input(POSITIONS, TensorProto.INT64, [*axes, "batch", "time"])


class RopeTables:
    """Tables of a call's `position_ids`, each emitted once, when a layer first asks for it."""

    def __init__(self, file: OnnxFile, head_dim: int) -> None:
        """Nothing is emitted yet."""
        self._file, self._head_dim = file, head_dim
        self._made: dict[RopeConfig, tuple[str, str]] = {}

    def of(self, rope: RopeConfig) -> tuple[str, str]:
        """Cosines and sines, `[B, T, 1, d / 2]`."""
        if rope not in self._made:
            self._made[rope] = self._tables(rope)
        return self._made[rope]

    def _tables(self, rope: RopeConfig) -> tuple[str, str]:
        node, constant = self._file.node, self._file.constant
        table: np.ndarray = inverse_frequencies(rope, self._head_dim).numpy()
        frequencies = constant(table, "rope.frequencies")
        angles = node("Mul", [self._steps(rope), frequencies], "rope.angles")
        return node("Cos", [angles], "rope.cos"), node("Sin", [angles], "rope.sin")

    def _steps(self, rope: RopeConfig) -> str:
        """Positions, fp32 `[B, T, 1, 1]`; with M-RoPE of each frequency, `[B, T, 1, d / 2]`."""
        node, constant = self._file.node, self._file.constant
        number = node("Cast", [POSITIONS], "rope.cast", to=TensorProto.FLOAT)
        if rope.mrope_section is None:
            return node("Unsqueeze", [number, constant([2, 3])], "rope.steps")
        axes = constant(frequency_axes(rope.mrope_section))
        chosen = node("Gather", [number, axes], "rope.axes", axis=0)
        rows = node("Transpose", [chosen], "rope.rows", perm=[1, 2, 0])
        return node("Unsqueeze", [rows, constant([2])], "rope.steps")
