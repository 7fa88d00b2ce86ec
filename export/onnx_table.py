"""The token table and the head, which may be one matrix; in int4 and int8 both have 8 bits."""

from typing import Literal

import numpy as np
from onnx import TensorProto

from edgekit.export.blockwise import BlockWeights
from edgekit.export.onnx_file import CONTRIB, OnnxFile
from edgekit.export.onnx_linear import LinearWriter

__all__ = ["TokenTable"]

BITS: Literal[8] = 8


class TokenTable:
    """Writes `embed` and then `head`; a tied head stores its numbers once."""

    def __init__(self, file: OnnxFile, writer: LinearWriter) -> None:
        """Use `writer`'s store and format."""
        self._file, self._writer = file, writer
        self._blocks: dict[str, tuple[BlockWeights, tuple[str, str]]] = {}
        self._floats: dict[str, str] = {}

    def embed(self, name: str, ids: str) -> str:
        """Rows of `{name}.weight` for `ids [B, T]`: fp32 `[B, T, D]`."""
        if self._writer.bits is None:
            rows = self._file.node("Gather", [self._float_table(name), ids], name)
            if not self._writer.half:
                return rows
            return self._file.node("Cast", [rows], f"{name}.cast", to=TensorProto.FLOAT)
        table, (q, scales) = self._block_table(name)
        take = self._contrib_rows if self._writer.contrib else self._portable_rows
        return self._narrowed(take(name, ids, table, q, scales), table, name)

    def head(self, x: str, name: str) -> str:
        """Logits `[B, T, V]` of `x [B, T, D]` by `{name}.weight [V, D]`."""
        if self._writer.bits is None:
            return self._float_head(x, self._float_table(name))
        if self._writer.contrib:
            table, stored = self._block_table(name)
            return self._writer.matmul_nbits(x, table, stored, "lm_head")
        return self._writer.quantised(x, self._writer.blocks(name, BITS), "lm_head", None)

    def _float_table(self, name: str) -> str:
        if name not in self._floats:
            table = self._writer.array(f"{name}.weight")
            kind = np.float16 if self._writer.half else np.float32
            self._floats[name] = self._file.weight(f"{name}.weight", table.astype(kind, copy=False))
        return self._floats[name]

    def _float_head(self, x: str, table: str) -> str:
        """Gemm, which takes the table as it lies: `[V, D]`."""
        if self._writer.half:
            table = self._file.node("Cast", [table], "lm_head.cast", to=TensorProto.FLOAT)
        shape = self._file.node("Shape", [x], "lm_head.shape", end=2)
        last = self._file.constant([-1])
        wide = self._file.node("Concat", [shape, last], "lm_head.logits_shape", axis=0)
        width = self._file.node("Shape", [table], "lm_head.width", start=1)
        rows = self._file.node("Concat", [last, width], "lm_head.rows_shape", axis=0)
        flat = self._file.node("Reshape", [x, rows], "lm_head.rows")
        product = self._file.node("Gemm", [flat, table], "lm_head", transB=1)
        return self._file.node("Reshape", [product, wide], "lm_head.unflatten")

    def _block_table(self, name: str) -> tuple[BlockWeights, tuple[str, str]]:
        if name not in self._blocks:
            table = self._writer.blocks(name, BITS)
            if self._writer.contrib:
                stored = self._writer.store_blocks(table, name)
            else:
                q = self._file.weight(f"{name}.weight", table.q)
                stored = (q, self._file.weight(f"{name}.scales", table.scales))
            self._blocks[name] = (table, stored)
        return self._blocks[name]

    def _contrib_rows(self, name: str, ids: str, table: BlockWeights, q: str, scales: str) -> str:
        flat = self._file.alias(f"{name}.rows", q, (len(table.q), table.q[0].size))
        return self._file.node(
            f"{CONTRIB}.GatherBlockQuantized",
            [flat, ids, scales],
            name,
            bits=BITS,
            block_size=table.q.shape[2],
            quantize_axis=1,
            gather_axis=0,
        )

    def _portable_rows(self, name: str, ids: str, table: BlockWeights, q: str, scales: str) -> str:
        taken = self._file.node("Gather", [q, ids], name)  # [B, T, blocks, block]
        numbers = self._file.node("Cast", [taken], f"{name}.cast", to=TensorProto.FLOAT)
        factors = self._file.node("Gather", [scales, ids], f"{name}.scales_of")
        last = self._file.constant([-1])
        factors = self._file.node("Unsqueeze", [factors, last], f"{name}.factors")
        rows = self._file.node("Mul", [numbers, factors], f"{name}.dequantise")
        return self._file.node(
            "Reshape", [rows, self._file.constant([0, 0, table.q[0].size])], f"{name}.flatten"
        )

    def _narrowed(self, rows: str, table: BlockWeights, name: str) -> str:
        """Without the padding of the last block."""
        if table.q[0].size == table.width:
            return rows
        bounds = [self._file.constant([n]) for n in (0, table.width, 2)]
        return self._file.node("Slice", [rows, *bounds], f"{name}.narrow")
