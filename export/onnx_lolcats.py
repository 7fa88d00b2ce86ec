"""LoLCATs in ONNX, on either operator set: its linear half is the graph's own recurrence."""

import functools

import numpy as np

from edgekit.export.onnx_graph import END, OnnxGraph
from edgekit.export.onnx_values import Value
from edgekit.export.onnx_window import WindowBands
from edgekit.export.states import refuse_gate, value_channels

__all__ = ["LolcatsGraph"]


class LolcatsGraph(OnnxGraph):
    """`OnnxGraph` with `Graph.window_attention`."""

    def window_attention(self, q: Value, k: Value, v: Value, prefix: str, layer: int) -> Value:
        """See `Graph.window_attention`."""
        config, name, node = self.config, f"{prefix}.window", self.file.node
        refuse_gate(config, layer)
        rows = node("Concat", [k.name, v.name], f"{name}.new", axis=-1)
        rows = node("Mul", [rows, self.mask], f"{name}.mask")
        rows = node("Concat", [rows, self.mask], f"{name}.rows", axis=-1)
        history = self._history(rows, layer, name)  # [B, 2 S d + 1, w + T]
        first = [self.file.constant([0]), self.time, self.file.constant([2])]
        gone = node("Slice", [history, *first], f"{name}.gone")  # [B, 2 S d + 1, T]
        bounds = [self.file.constant([n]) for n in (0, config.num_kv_heads * config.head_dim, 1)]
        keys = node("Slice", [gone, *bounds], f"{name}.gone_keys")
        queries = node("Transpose", [q.name], f"{name}.q", perm=[0, 2, 1])
        features = (
            self._window_features(queries, config.groups, f"{prefix}.feature_map_q"),
            self._window_features(keys, 1, f"{prefix}.feature_map_k"),
        )
        columns = self.file.constant(value_channels(config), "value_channels")
        values = node("Gather", [gone, columns], f"{name}.values", axis=1)
        values = node("Transpose", [values], f"{name}.value_rows", perm=[0, 2, 1])
        owners = (config.num_heads, config.lolcats.features(config.head_dim))
        older = self._recurrence(*features, values, None, owners, layer, f"{prefix}.linear")
        factor = self.writer.weights.tensor(f"{prefix}.window_factor.weight")
        history = node("Transpose", [history], f"{name}.history", perm=[0, 2, 1])
        return Value(self._bands.attend(q.name, history, older, factor, name))

    @functools.cached_property
    def _bands(self) -> WindowBands:
        return WindowBands(self.file, self.config, self.chunks, self.time)

    def _history(self, rows: str, layer: int, name: str) -> str:
        """`rows [B, T, C]` after the columns of the state: `[B, C, w + T]`."""
        past, present = self.state(layer, "conv")
        channels = self.file.node("Transpose", [rows], f"{name}.channels", perm=[0, 2, 1])
        history = self.file.node("Concat", [past, channels], f"{name}.joined", axis=2)
        bounds = [self.file.constant([n]) for n in (-self.config.lolcats.window, END, 2)]
        self.file.nodes("Slice", [history, *bounds], f"{name}.tail", [present])
        return history

    def _window_features(self, channels: str, groups: int, name: str) -> str:
        """Features `[B, T, H F]` of channels `[B, S groups d, T]`, one matrix per query head."""
        config = self.config
        weight = self.writer.array(f"{name}.weight")
        d, f = weight.shape[1:]
        matrices = weight.reshape(config.num_kv_heads, config.groups, d, f)
        stored = self.file.weight(f"{name}.weight", np.ascontiguousarray(matrices))
        shape = [0, config.num_kv_heads, groups, d, -1]
        heads = self._reshape(channels, shape, f"{name}.heads")
        return self._positive(self._project(heads, stored, name), config.num_heads, f, name)
