"""Linear layers of the ONNX graph, in every weight format.

Contrib operators: quantised weights are `MatMulNBits`, block-wise with activations in int8.
Portable: blocked `DequantizeLinear` before `MatMul`, which ONNX Runtime turns into the same kernel
at load. fp16 is a storage format: the casts to fp32 are folded at load.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from edgekit.export.blockwise import Bits, BlockWeights, quantise
from edgekit.export.onnx_file import CONTRIB, OnnxFile
from edgekit.models.weights import WeightStore

__all__ = ["Columns", "LinearWriter", "WeightFormat", "joint_name", "repeat_heads"]

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level for an integer product
Array = NDArray[Any]
Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Columns:
    """Output heads `width` wide that get one column of ones, then zeros, up to `total` columns."""

    heads: int
    width: int
    total: int

    def spread(self, rows: Array) -> Array:
        """Rows `[heads * width, ...]` with zero rows where the new columns are."""
        heads = rows.reshape(self.heads, self.width, *rows.shape[1:])
        padding = [(0, 0), (0, self.total - self.width)] + [(0, 0)] * (rows.ndim - 1)
        return np.pad(heads, padding).reshape(-1, *rows.shape[1:])

    def bias(self, bias: Float) -> Float:
        """The same for a bias, with a one in the first new column of each head."""
        wider = self.spread(bias).reshape(self.heads, self.total)
        wider[:, self.width] = 1.0
        return wider.reshape(-1)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A torch matrix whose slices numpy can read, whatever float type it has."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __getitem__(self, rows: slice) -> Array:
        part: Array = self.tensor[rows].float().numpy()
        return part


def joint_name(names: Sequence[str]) -> str:
    """One module path for several: `a.q_proj`, `a.k_proj` become `a.q_proj_k_proj`."""
    first, *rest = names
    return "_".join([first, *(name.rpartition(".")[2] for name in rest)])


class LinearWriter:
    """Writes the weights of one store in one format, and the operators that use them."""

    def __init__(
        self,
        file: OnnxFile,
        weights: WeightStore,
        weights_format: str,
        *,
        contrib: bool,
    ) -> None:
        """Read from `weights`, write to `file`."""
        self.file, self.weights, self.contrib = file, weights, contrib
        self.half = weights_format == "fp16"
        self.bits = BITS.get(weights_format)

    def array(self, name: str) -> Float:
        """The tensor `name` in fp32."""
        values: Float = self.weights.tensor(name).float().numpy()
        return values

    def blocks(self, name: str, bits: Bits) -> BlockWeights:
        """The matrix `{name}.weight`, quantised a few rows at a time."""
        return quantise(_Rows(self.weights.tensor(f"{name}.weight")), bits)

    def fused(
        self, x: str, names: Sequence[str], columns: Sequence[Columns | None]
    ) -> tuple[str, list[int]]:
        """Linear layers over `x`, outputs side by side.

        Args:
            x: value `[B, T, K]`.
            names: module paths; `{name}.bias` is added where the store has one.
            columns: for each layer, the extra columns its heads get, if any.

        Returns:
            The value `[B, T, sum of widths]` and the widths.
        """
        name = joint_name(names)
        bias, widths = self._bias(names, columns)
        if self.bits is None:
            weights = [
                _spread(self.array(f"{n}.weight"), c) for n, c in zip(names, columns, strict=True)
            ]
            return self.plain(x, np.concatenate(weights), name, bias), widths
        parts = [self.blocks(n, self.bits) for n in names]
        q = np.concatenate([_spread(p.q, c) for p, c in zip(parts, columns, strict=True)])
        scales = np.concatenate([_spread(p.scales, c) for p, c in zip(parts, columns, strict=True)])
        joined = BlockWeights(q=q, scales=scales, width=parts[0].width, bits=self.bits)
        return self.quantised(x, joined, name, bias), widths

    def dense(
        self, x: str, name: str, *, scale: float = 1.0, heads: tuple[int, int] = (1, 1)
    ) -> str:
        """An fp32 product with `scale * {name}.weight`, without its bias.

        `heads = (width, times)`: each head of `width` outputs is repeated, copies adjacent.
        """
        weight = repeat_heads(self.array(f"{name}.weight"), *heads) * np.float32(scale)
        stored = self.file.weight(f"{name}.weight", np.ascontiguousarray(weight.T))
        return self.file.node("MatMul", [x, stored], name)

    def plain(self, x: str, weight: Float, name: str, bias: Float | None) -> str:
        """A product with `weight [N, K]` in fp32, or stored as fp16."""
        stored = self.stored_float(np.ascontiguousarray(weight.T), f"{name}.weight")
        y = self.file.node("MatMul", [x, stored], name)
        return self._plus(y, bias, name)

    def stored_float(self, array: Float, name: str) -> str:
        """A value of fp32 numbers, kept as fp16 in the file if that is the format."""
        if not self.half:
            return self.file.weight(name, array)
        stored = self.file.weight(name, array.astype(np.float16))
        return self.file.node("Cast", [stored], f"{name}.cast", to=TensorProto.FLOAT)

    def quantised(self, x: str, weights: BlockWeights, name: str, bias: Float | None) -> str:
        """A product with block-wise weights."""
        if not self.contrib:
            return self._plus(self._dequantised_product(x, weights, name), bias, name)
        q, scales = self.store_blocks(weights, name)
        return self.matmul_nbits(x, weights, (q, scales), name, bias)

    def store_blocks(self, weights: BlockWeights, name: str) -> tuple[str, str]:
        """Integers, made unsigned and packed low nibble first, and scales."""
        if weights.bits == 8:
            packed = (weights.q.view(np.uint8)) ^ np.uint8(0x80)
        else:
            packed = _nibbles((weights.q + np.int8(8)).view(np.uint8))
        q = self.file.weight(f"{name}.weight", packed)
        return q, self.file.weight(f"{name}.scales", weights.scales)

    def matmul_nbits(
        self,
        x: str,
        weights: BlockWeights,
        stored: tuple[str, str],
        name: str,
        bias: Float | None = None,
    ) -> str:
        """The contrib operator over `stored` integers and scales."""
        inputs = [x, *stored]
        if bias is not None:
            inputs += ["", "", self.file.weight(f"{name}.bias", bias)]
        return self.file.node(
            f"{CONTRIB}.MatMulNBits",
            inputs,
            name,
            K=weights.width,
            N=len(weights.q),
            bits=weights.bits,
            block_size=weights.q.shape[2],
            accuracy_level=INT8_ACTIVATIONS,
        )

    def _dequantised_product(self, x: str, weights: BlockWeights, name: str) -> str:
        """DequantizeLinear blocked along the first axis of `[K, N]`, then MatMul."""
        rows, _, block = weights.q.shape
        columns = np.ascontiguousarray(weights.q.reshape(rows, -1)[:, : weights.width].T)
        if weights.bits == 8:
            q = self.file.weight(f"{name}.weight", columns)
        else:
            flat = np.pad(columns.reshape(-1), (0, columns.size % 2)).view(np.uint8) & np.uint8(15)
            q = self.file.weight(f"{name}.weight", _nibbles(flat), TensorProto.INT4, columns.shape)
        scales = self.file.weight(f"{name}.scales", np.ascontiguousarray(weights.scales.T))
        dense = self.file.node(
            "DequantizeLinear", [q, scales], f"{name}.dequantise", axis=0, block_size=block
        )
        return self.file.node("MatMul", [x, dense], name)

    def _plus(self, y: str, bias: Float | None, name: str) -> str:
        if bias is None:
            return y
        return self.file.node("Add", [y, self.file.weight(f"{name}.bias", bias)], f"{name}.add")

    def _bias(
        self, names: Sequence[str], columns: Sequence[Columns | None]
    ) -> tuple[Float | None, list[int]]:
        """The joint bias (None if there is nothing to add) and each layer's width."""
        pieces = []
        for name, extra in zip(names, columns, strict=True):
            rows = self.weights.tensor(f"{name}.weight").shape[0]
            given = f"{name}.bias"
            bias = self.array(given) if given in self.weights else np.zeros(rows, np.float32)
            pieces.append(bias if extra is None else extra.bias(bias))
        joint = np.concatenate(pieces)
        return (joint if joint.any() else None), [len(piece) for piece in pieces]


def repeat_heads(array: Float, width: int, times: int) -> Float:
    """Repeat groups of `width` rows `times` times, copies adjacent."""
    if times == 1:
        return array
    groups = array.reshape(-1, width, *array.shape[1:])
    return groups.repeat(times, axis=0).reshape(-1, *array.shape[1:])


def _spread(rows: Array, columns: Columns | None) -> Array:
    return rows if columns is None else columns.spread(rows)


def _nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pairs along the last axis packed into bytes, the first in the low half."""
    return values[..., ::2] | np.left_shift(values[..., 1::2], np.uint8(4))
