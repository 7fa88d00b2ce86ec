"""Softmax attention, as the teacher has it: grouped queries, rotary positions, a key-value cache.

A sliding layer sees its window alone; with `image_attention = "bidirectional"` the tokens of one
image see each other. Keys outside the window stay in the cache.

The cache grows by one key and one value per token: `key` and `value`, `[B, Hkv, S, d]`. Where SPIN
scores heads by their logits there is also `spin`, fp32 `[B, Hkv, d + 1]`, constant in size: the sum
of the image keys so far, and how many they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from edgekit.kernels.head_gate.reference import image_sums, summed_logits
from edgekit.mixers.base import MixerConfig, MixerContext, State, TokenMixer, image_tokens
from edgekit.mixers.graph import Graph

__all__ = ["Mixer"]


class Mixer(TokenMixer):
    """Softmax attention, causal but within images."""

    def mix(
        self, x: torch.Tensor, context: MixerContext, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Attend from `x [B, T, D]` to the cache and itself."""
        q, k, v = self.project(x)
        q, k, v = self.rotated(q, context), self.rotated(k, context), self.marked(v, context)
        sums = self._image_sums(k, context, state)
        looks = None if sums is None else (summed_logits(q, sums), sums[:, :, 0, -1] > 0)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if state is not None:
            k, v = torch.cat((state["key"], k), dim=2), torch.cat((state["value"], v), dim=2)
        image = context.image if self.config.image_attention == "bidirectional" else None
        limits = (context.past_mask, self.window, image)
        # torch needs no mask in memory then
        plain = state is None and all(limit is None for limit in limits)
        y = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if plain else _visible(q, k, *limits),
            is_causal=plain,
            scale=self.config.attention_scale,
            enable_gqa=True,
        )
        after = {"key": k, "value": v}
        if sums is not None:
            after["spin"] = sums[:, -1].clone()  # a view would keep the sums of every query
        return self.gated(y.transpose(1, 2), context, looks), after

    def _image_sums(
        self, k: torch.Tensor, context: MixerContext, state: State | None
    ) -> torch.Tensor | None:
        """`image_sums` of rotated keys `[B, T, Hkv, d]` without padding; None: SPIN needs none."""
        if not self.sums_keys:
            return None
        image = image_tokens(k, context)
        if context.mask is not None:
            image = image & context.mask.bool()
        return image_sums(k, image, None if state is None else state["spin"])

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
        y = graph.attention(graph.rope(q, layer), graph.rope(k, layer), v, layer)
        return graph.linears(y, [f"{prefix}.o_proj"])[0]


def _visible(
    q: torch.Tensor,
    k: torch.Tensor,
    past_mask: torch.Tensor | None,
    window: int | None,
    image: torch.Tensor | None,
) -> torch.Tensor:
    """Which keys each query sees, `[.., T, S]`; a padded query sees itself."""
    time, total = q.shape[2], k.shape[2]
    rows = torch.arange(total - time, total, device=q.device)[:, None]
    columns = torch.arange(total, device=q.device)
    seen = columns <= rows
    if window is not None:
        seen = seen & (columns > rows - window)
    if image is not None:
        seen = seen | _same_image(image, total)
    if past_mask is None:
        return seen
    return (seen & past_mask.bool()[:, None, None, :]) | (columns == rows)


def _same_image(image: torch.Tensor, total: int) -> torch.Tensor:
    """Which keys are of the query's own image, `[B, 1, T, S]`: no text lies between them.

    `image` says which of the last T tokens belong to an image, bool `[B, T]`.
    """
    number = ((~image).cumsum(dim=1) + 1) * image  # 0 for text
    keys = functional.pad(number, (total - image.shape[1], 0))[:, None, None, :]
    queries = number[:, None, :, None]
    return (queries == keys) & (queries > 0)
