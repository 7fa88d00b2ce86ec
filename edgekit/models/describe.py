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
        if config.sandwich_norms:
            mixed = graph.rms_norm(mixed, f"{prefix}.post_attention_layernorm")
        x = graph.add(x, mixed)
        x = graph.add(x, _mlp(graph, x, prefix, config))
    x = graph.rms_norm(x, "model.norm")
    graph.logits(x, "model.embed_tokens" if config.tied_head else "lm_head")


def _mlp(graph: Graph[Any], x: Any, prefix: str, config: DecoderConfig) -> Any:
    """The feed-forward and the norms around it."""
    first = "pre_feedforward" if config.sandwich_norms else "post_attention"
    normed = graph.rms_norm(x, f"{prefix}.{first}_layernorm")
    gate, up = graph.linears(normed, [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"])
    unit = graph.swiglu if config.activation == "silu" else graph.geglu
    y = graph.linears(unit(gate, up), [f"{prefix}.mlp.down_proj"])[0]
    if config.sandwich_norms:
        y = graph.rms_norm(y, f"{prefix}.post_feedforward_layernorm")
    return y
