"""The softmax half of LoLCATs' attention in ONNX, joined with its linear half.

`kernels/window/reference.py` has the maths. A call's T tokens are cut into n chunks of C; a chunk
sees its own band of w + C columns of the history. B batch, S KV heads, G query heads per KV head, V
value columns (values, then the mass and copies of it).
"""

import functools

import numpy as np
import torch
from torch.nn import functional

from edgekit.export.onnx_chunks import Chunks
from edgekit.export.onnx_file import OnnxFile
from edgekit.models.config import DecoderConfig

__all__ = ["WindowBands"]

HIDDEN = -1e30
END = np.iinfo(np.int64).max  # of a slice


class WindowBands:
    """Adds the attention layer by layer; what the layers share is emitted once."""

    def __init__(self, file: OnnxFile, config: DecoderConfig, chunks: Chunks, time: str) -> None:
        """Nothing is emitted before a layer asks; `time` is T, int64 `[1]`."""
        self._file, self._config, self._chunks, self._time = file, config, chunks, time

    def attend(self, q: str, history: str, older: str, factor: torch.Tensor, name: str) -> str:
        """The attention's output `[B, T, H d]`.

        Args:
            q: rotated queries `[B, T, H d]`.
            history: keys, values and whether there is a token, of the window and then of the call,
                `[B, w + T, 2 S d + 1]`.
            older: the linear half's sums and their mass, `[B, T, H V]`.
            factor: the window's factor of each query head, `[H]`.
            name: of the nodes.
        """
        config, node, constant = self._config, self._file.node, self._file.constant
        d, width = config.head_dim, config.num_kv_heads * config.head_dim
        filled = node("Pad", [history, self._chunks.padding], f"{name}.padded")
        around = node("Gather", [filled, self._columns], f"{name}.bands", axis=1)
        sizes = constant([width, width, 1])
        k, v, seen = self._file.nodes("Split", [around, sizes], f"{name}.parts", 3, axis=3)
        queries = self._chunked(q, d, f"{name}.q")
        scale = constant(np.float32(config.logit_scale), "window.scale")
        queries = node("Mul", [queries, scale], f"{name}.scaled")
        keys = self._band_heads(k, [0, 3, 5, 1, 4, 2], f"{name}.k")  # [B, S, 1, n, d, C + w]
        scores = node("MatMul", [queries, keys], f"{name}.scores")
        logits = self._logits(scores, seen, factor, name)
        values = self._band_heads(v, [0, 3, 5, 1, 2, 4], f"{name}.v")  # [B, S, 1, n, C + w, d]
        y = self._joined(logits, values, self._chunked(older, config.value_columns, name), name)
        rows = node("Transpose", [y], f"{name}.rows", perm=[0, 3, 4, 1, 2, 5])
        flat = node("Reshape", [rows, constant([0, -1, config.num_heads * d])], f"{name}.flatten")
        bounds = [constant([0]), self._time, constant([1])]
        return node("Slice", [flat, *bounds], f"{name}.unpadded")

    def _chunked(self, x: str, width: int, name: str) -> str:
        """`[B, T, H width]` padded and cut: `[B, S, G, n, C, width]`."""
        heads = [self._config.num_kv_heads, self._config.groups, width]
        filled = self._file.node("Pad", [x, self._chunks.padding], f"{name}.filled")
        shape = [self._file.constant([0]), *self._chunks.shape, self._file.constant(heads)]
        wanted = self._file.node("Concat", shape, f"{name}.chunk_shape", axis=0)
        apart = self._file.node("Reshape", [filled, wanted], f"{name}.chunks")
        return self._file.node("Transpose", [apart], f"{name}.heads", perm=[0, 3, 4, 1, 2, 5])

    def _band_heads(self, x: str, order: list[int], name: str) -> str:
        """`[B, n, C + w, S d]` as `[B, n, C + w, S, d, 1]` in another order."""
        sizes = [0, 0, 0, self._config.num_kv_heads, self._config.head_dim, 1]
        apart = self._file.node("Reshape", [x, self._file.constant(sizes)], f"{name}.apart")
        return self._file.node("Transpose", [apart], f"{name}.band", perm=order)

    def _logits(self, scores: str, seen: str, factor: torch.Tensor, name: str) -> str:
        """Weighted logits of the window, `HIDDEN` outside it: `[B, S, G, n, C, C + w]`."""
        node, constant = self._file.node, self._file.constant
        half = constant(np.float32(0.5), "half")
        tokens = node("Greater", [seen, half], f"{name}.tokens")  # [B, n, C + w, 1]
        tokens = node("Transpose", [tokens], f"{name}.token_row", perm=[0, 1, 3, 2])
        tokens = node("Unsqueeze", [tokens, constant([1, 2])], f"{name}.token_rows")
        visible = node("And", [tokens, self._band], f"{name}.visible")
        hidden = constant(np.float32(HIDDEN), "window.hidden")
        logits = node("Where", [visible, scores, hidden], f"{name}.shown")
        if not self._config.lolcats.common_scale:
            largest = node("ReduceMax", [logits, constant([-1])], f"{name}.largest", keepdims=1)
            logits = node("Sub", [logits, largest], f"{name}.shifted")
        shape = (self._config.num_kv_heads, self._config.groups, 1, 1, 1)
        weight = functional.logsigmoid(factor.float()).reshape(shape).numpy()
        return node("Add", [logits, constant(weight, f"{name}.log_gamma")], f"{name}.logits")

    def _joined(self, logits: str, values: str, older: str, name: str) -> str:
        """The linear half's log mass as one more logit, its mean as one more value."""
        node, constant, d = self._file.node, self._file.constant, self._config.head_dim
        total, mass = (
            self._columns_of(older, *ends, f"{name}.linear") for ends in ((0, d), (d, d + 1))
        )
        eps = constant(np.float32(self._config.lolcats.eps), "window.eps")
        mass = node("Add", [mass, eps], f"{name}.mass")
        log_mass = node("Log", [mass], f"{name}.log_mass")
        together = node("Concat", [logits, log_mass], f"{name}.all_logits", axis=5)
        weights = node("Softmax", [together], f"{name}.softmax", axis=5)
        near, far = (
            self._columns_of(weights, *ends, f"{name}.weights") for ends in ((0, -1), (-1, END))
        )
        inside = node("MatMul", [near, values], f"{name}.inside")
        mean = node("Div", [total, mass], f"{name}.mean")
        outside = node("Mul", [far, mean], f"{name}.outside")
        return node("Add", [inside, outside], f"{name}.joined")

    def _columns_of(self, x: str, start: int, end: int, name: str) -> str:
        """`x[.., start:end]` of six axes."""
        bounds = [self._file.constant([n]) for n in (start, end, 5)]
        return self._file.node("Slice", [x, *bounds], name)

    @functools.cached_property
    def _wide(self) -> str:
        """0 up to C + w."""
        window = self._file.constant([self._config.lolcats.window])
        width = self._file.node("Add", [self._chunks.shape[1], window], "band.width")
        return self._chunks.steps(width, "band.steps")

    @functools.cached_property
    def _columns(self) -> str:
        """Columns of each chunk's band, `[n, C + w]`."""
        count, size = self._chunks.shape
        chunks = self._chunks.steps(count, "band.chunks")
        starts = self._file.node("Mul", [chunks, size], "band.starts")
        starts = self._file.node("Unsqueeze", [starts, self._file.constant([1])], "band.firsts")
        return self._file.node("Add", [starts, self._wide], "band.columns")

    @functools.cached_property
    def _band(self) -> str:
        """The columns t < j <= t + w of row t, bool `[C, C + w]`."""
        node, constant = self._file.node, self._file.constant
        rows = self._chunks.steps(self._chunks.shape[1], "band.range")
        rows = node("Unsqueeze", [rows, constant([1])], "band.rows")
        ends = node("Add", [rows, constant([self._config.lolcats.window])], "band.ends")
        after = node("Greater", [self._wide, rows], "band.after")
        before = node("LessOrEqual", [self._wide, ends], "band.before")
        return node("And", [after, before], "band")
