"""The vocabulary in which a decoder is described to the exporters.

`models/describe.py` and each mixer's `describe` speak it; `export/to_openvino.py` and
`export/to_onnx.py` implement it. A handle stands for a tensor of the graph being built; layouts are
`[B, T, width]` with heads side by side (`width = heads * head_width`, head major) unless said
otherwise. Weights are named, not passed: an implementation reads them from its weight store,
converts and writes them one at a time.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

__all__ = ["Graph"]

T = TypeVar("T")


class Graph(Protocol[T]):
    """A graph under construction; a method adds nodes and returns their result's handle."""

    def embed(self, name: str) -> T:
        """Rows of `{name}.weight` for the graph's `input_ids [B, T]`, scaled as configured."""
        ...

    def add(self, x: T, y: T) -> T:
        """The residual sum of two `[B, T, width]`."""
        ...

    def rms_norm(self, x: T, name: str) -> T:
        """Root-mean-square norm over the width, scaled by `{name}.weight` (arXiv 1910.07467)."""
        ...

    def head_norm(self, x: T, name: str) -> T:
        """The same over each head, `{name}.weight [head_dim]` (Qwen3's q_norm and k_norm)."""
        ...

    def linears(self, x: T, names: Sequence[str]) -> list[T]:
        """Linear layers over one input; their weights `[out, in]` may be quantised and fused.

        A `{name}.bias` in the store is added.
        """
        ...

    def dense(self, x: T, name: str) -> T:
        """A linear layer whose weight is never quantised; a `{name}.bias` in the store is added."""
        ...

    def swiglu(self, gate: T, up: T) -> T:
        """silu(gate) * up."""
        ...

    def geglu(self, gate: T, up: T) -> T:
        """gelu(gate) * up, GELU in its tanh approximation."""
        ...

    def rope(self, x: T, layer: int) -> T:
        """Rotate each head by the graph's `position_ids`, half-split layout, as `layer` does.

        They are `[B, T]`; with M-RoPE `[3, B, T]`, time, height and width.
        """
        ...

    def repeat_heads(self, x: T, head_width: int, times: int) -> T:
        """Repeat each head `times` times, copies adjacent: `[a b]` becomes `[a a b b]`."""
        ...

    def attention(self, q: T, k: T, v: T, layer: int) -> T:
        """Causal softmax attention, scaled, with a growing key-value state of `layer`.

        q has num_heads heads, k and v num_kv_heads; padding is taken from `attention_mask`. A
        sliding layer sees its window; tokens of one image see each other if configured.
        """
        ...

    def causal_conv(self, q: T, k: T, q_name: str, k_name: str, layer: int) -> tuple[T, T]:
        """Depthwise causal convolutions, taps `{name}.weight [channels, K]`, one state.

        The state holds the last K - 1 inputs of q's channels, then k's; padded inputs count as
        zero.
        """
        ...

    def feature_map(self, q: T, k: T, name: str) -> tuple[T, T]:
        """max([softmax(x W), softmax(-x W)], 1e-12) per head, `{name}.weight [heads, d, f]`.

        W has one matrix per state head; query head h uses state head h // (num_heads /
        state_heads).
        """
        ...

    def log_decay(self, x: T, down_name: str, up_name: str) -> T:
        """max(logsigmoid(up(down(x))) / gate_divisor, gate_floor): `[B, T, num_kv_heads * F]`."""
        ...

    def linear_attention(self, q: T, k: T, v: T, g: T, layer: int) -> T:
        """Gated linear attention with the recurrent state of `layer`.

        Normalised, or scaled by F^-1/2 if the configuration says so. q has num_heads heads of F
        features; k, g (F wide) and v (head_dim wide) have state_heads heads. Padded tokens
        contribute nothing: their k and g are zeroed here.
        """
        ...

    def window_attention(self, q: T, k: T, v: T, prefix: str, layer: int) -> T:
        """Softmax over a window joined with linear attention over older tokens; states of `layer`.

        q (num_heads heads), k and v (num_kv_heads heads) are rotated. Reads the tensors
        `{prefix}.feature_map_q.weight`, `.feature_map_k.weight` and `.window_factor.weight`.
        """
        ...

    def logits(self, x: T, name: str) -> None:
        """The head `{name}.weight [V, D]` over the last position: output `logits [B, 1, V]`."""
        ...
