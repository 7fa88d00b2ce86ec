"""The tables of rotary position embeddings in ONNX, where no operator rotates by itself."""

import numpy as np
from onnx import TensorProto

from edgekit.export.onnx_file import OnnxFile
from edgekit.models.config import RopeConfig
from edgekit.models.rope import inverse_frequencies

__all__ = ["RopeTables"]


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
        number = node("Cast", ["position_ids"], "rope.cast", to=TensorProto.FLOAT)
        steps = node("Unsqueeze", [number, constant([2, 3])], "rope.steps")
        table: np.ndarray = inverse_frequencies(rope, self._head_dim).numpy()
        angles = node("Mul", [steps, constant(table, "rope.frequencies")], "rope.angles")
        return node("Cos", [angles], "rope.cos"), node("Sin", [angles], "rope.sin")
