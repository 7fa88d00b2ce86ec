"""The decoder told to an exporter; mirrors `models/decoder.py`."""

from typing import Any

from edgekit.mixers.base import mixer_type
from edgekit.mixers.graph import Graph
from edgekit.models.config import DecoderConfig

__all__ = ["describe_decoder"]


def describe_decoder(graph: Graph[Any], config: DecoderConfig) -> None:
    """Add the whole decoder to `graph`, from `input_ids` to `logits`."""
    x = graph.embed("model.embed_tokens")
    for layer, mixer in enumerate(config.mixers):
        prefix = f"model.layers.{layer}"
        normed = graph.rms_norm(x, f"{prefix}.input_layernorm")
        mixed = mixer_type(mixer).describe(graph, normed, f"{prefix}.self_attn", layer, config)
        x = graph.add(x, mixed)
        normed = graph.rms_norm(x, f"{prefix}.post_attention_layernorm")
        gate, up = graph.linears(normed, [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"])
        x = graph.add(x, graph.linears(graph.swiglu(gate, up), [f"{prefix}.mlp.down_proj"])[0])
    x = graph.rms_norm(x, "model.norm")
    graph.logits(x, "model.embed_tokens" if config.tied_head else "lm_head")
