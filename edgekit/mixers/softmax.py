"""Softmax attention, as the teacher has it: grouped queries, rotary positions, a key-value cache.

The cache grows by one key and one value per token: `key` and `value`, `[B, Hkv, S, d]`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from edgekit.mixers.base import MixerConfig, MixerContext, State, TokenMixer
from edgekit.mixers.graph import Graph

__all__ = ["Mixer"]


class Mixer(TokenMixer):
    """Causal softmax attention over everything so far."""

    def mix(
        self, x: torch.Tensor, context: MixerContext, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Attend from `x [B, T, D]` to the cache and itself."""
        q, k, v = self.project(x)
        v = self.marked(v, context)
        q, k, v = (t.transpose(1, 2) for t in (context.rotate(q), context.rotate(k), v))
        if state is not None:
            k, v = torch.cat((state["key"], k), dim=2), torch.cat((state["value"], v), dim=2)
        plain = state is None and context.past_mask is None  # then torch needs no mask in memory
        visible = None if plain else _visible(q, k, context.past_mask)
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=plain, enable_gqa=True
        )
        return self.gated(y.transpose(1, 2), context), {"key": k, "value": v}

    @staticmethod
    def fresh_tensors(config: MixerConfig, layer: int) -> Mapping[str, torch.Tensor]:
        """Nothing: every tensor is the teacher's."""
        return {}

    @staticmethod
    def describe(graph: Graph[Any], x: Any, prefix: str, layer: int, config: MixerConfig) -> Any:
        """Projections, norms, rotation, attention, output projection."""
        q, k, v = graph.linears(x, [f"{prefix}.{n}" for n in ("q_proj", "k_proj", "v_proj")])
        if config.qk_norm:
            q, k = graph.head_norm(q, f"{prefix}.q_norm"), graph.head_norm(k, f"{prefix}.k_norm")
        y = graph.attention(graph.rope(q), graph.rope(k), v, layer)
        return graph.linears(y, [f"{prefix}.o_proj"])[0]


def _visible(q: torch.Tensor, k: torch.Tensor, past_mask: torch.Tensor | None) -> torch.Tensor:
    """Which keys each query sees, `[.., T, S]`; a padded query sees itself."""
    time, total = q.shape[2], k.shape[2]
    rows = torch.arange(total - time, total, device=q.device)[:, None]
    columns = torch.arange(total, device=q.device)
    causal = columns <= rows
    if past_mask is None:
        return causal
    return (causal & past_mask.bool()[:, None, None, :]) | (columns == rows)
