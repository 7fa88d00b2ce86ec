"""Side paths of the ONNX graph: added to the joint output of fused linear layers.

A slot is two overridable initialisers, `{module}.lora_A [in, r]` and `{module}.lora_B [r, out]`,
which a runtime feeds, or ONNX Runtime's LoraAdapter; of rank 0 if nobody does.
"""

import functools
from collections.abc import Sequence

import numpy as np

from edgekit.export.onnx_file import OnnxFile
from edgekit.export.onnx_linear import Columns, joint_name
from edgekit.export.side_paths import SidePaths
from edgekit.models.weights import WeightStore

__all__ = ["SideWriter"]


class SideWriter:
    """Adds the side paths of one graph."""

    def __init__(self, file: OnnxFile, weights: WeightStore, side: SidePaths, given: str) -> None:
        """Write to `file`; `given [B, T, ..]` is the graph's first input."""
        self._file, self._weights, self._side, self._given = file, weights, side, given
        self._zeros: dict[int, str] = {}

    def added(
        self,
        y: str,
        x: str,
        names: Sequence[str],
        columns: Sequence[Columns | None],
        widths: Sequence[int],
    ) -> str:
        """The joint output of several layers with their side paths.

        Args:
            y: the layers' outputs side by side, `[B, T, sum of widths]`.
            x: their input `[B, T, K]`.
            names: module paths.
            columns: for each layer, the extra columns its heads have, if any.
            widths: of each layer, extra columns included.
        """
        name, layers = joint_name(names), list(zip(names, columns, widths, strict=True))
        if any(n in self._side.slots for n in names):
            pieces = [self._slot(x, *layer) for layer in layers]
            joint = pieces[0]
            if len(pieces) > 1:
                joint = self._file.node("Concat", pieces, f"{name}.lora", axis=-1)
            y = self._file.node("Add", [y, joint], f"{name}.lora_add")
        if any(n in self._side.constant for n in names):
            y = self._constant_path(y, x, layers, name)
        return y

    def _slot(self, x: str, name: str, columns: Columns | None, width: int) -> str:
        """B (A x) of one layer with its extra columns, or zeros: `[B, T, width]`."""
        if name not in self._side.slots:
            return self._nothing(width)
        out, inner = self._weights.tensor(f"{name}.weight").shape
        a = self._pair_input(f"{name}.lora_A", [inner, f"{name}.rank"])
        b = self._pair_input(f"{name}.lora_B", [f"{name}.rank", out])
        down = self._file.node("MatMul", [x, a], f"{name}.lora_down")
        up = self._file.node("MatMul", [down, b], f"{name}.lora_up")
        return up if columns is None else self._spread(up, columns, name)

    def _pair_input(self, name: str, axes: list[int | str]) -> str:
        empty = np.zeros([0 if isinstance(n, str) else n for n in axes], np.float32)
        return self._file.optional_input(name, empty, axes)

    def _spread(self, y: str, columns: Columns, name: str) -> str:
        """Heads of `[B, T, heads * width]` widened to `total` columns by zeros."""
        node, constant = self._file.node, self._file.constant
        apart = constant([0, 0, columns.heads, columns.width])
        heads = node("Reshape", [y, apart], f"{name}.lora_heads")
        pads = constant([0] * 7 + [columns.total - columns.width])
        wider = node("Pad", [heads, pads], f"{name}.lora_columns")
        flat = constant([0, 0, columns.heads * columns.total])
        return node("Reshape", [wider, flat], f"{name}.lora_flatten")

    def _nothing(self, width: int) -> str:
        """Zeros `[B, T, width]`, made once for all layers."""
        if width not in self._zeros:
            shape = [self._batch_and_time, self._file.constant([width])]
            wanted = self._file.node("Concat", shape, "lora.zeros_shape", axis=0)
            zero = self._file.constant(np.float32(0), "zero")
            self._zeros[width] = self._file.node("Expand", [zero, wanted], "lora.zeros")
        return self._zeros[width]

    @functools.cached_property
    def _batch_and_time(self) -> str:
        return self._file.node("Shape", [self._given], "lora.batch_and_time", end=2)

    def _constant_path(
        self, y: str, x: str, layers: Sequence[tuple[str, Columns | None, int]], name: str
    ) -> str:
        """All pairs as one: A side by side, B a matrix of blocks."""
        downs, ups, start = [], [], 0
        total = sum(width for _, _, width in layers)
        for module, columns, width in layers:
            pair = self._side.constant.get(module)
            if pair is not None:
                rows = pair.b.float().numpy()
                block = np.zeros((pair.rank, total), np.float32)
                block[:, start : start + width] = (columns.spread(rows) if columns else rows).T
                downs.append(pair.a.float().numpy().T)
                ups.append(block)
            start += width
        a = self._file.weight(f"{name}.side_A", np.concatenate(downs, axis=1))
        b = self._file.weight(f"{name}.side_B", np.concatenate(ups))
        down = self._file.node("MatMul", [x, a], f"{name}.side_down")
        up = self._file.node("MatMul", [down, b], f"{name}.side_up")
        return self._file.node("Add", [y, up], f"{name}.side_add")
