"""`genai_config.json`: what onnxruntime-genai needs to open the directory."""

import json
from pathlib import Path
from typing import Any

from edgekit.export.onnx_graph import LAST_LOGITS
from edgekit.models.config import DecoderConfig

__all__ = ["genai_config", "write_genai_config"]

UNBOUNDED = 1 << 20  # genai wants a length even where memory is constant


def genai_config(config: DecoderConfig, *, shared_cache: bool) -> dict[str, Any]:
    """The JSON-ready configuration for one decoder.

    Args:
        config: the decoder.
        shared_cache: whether keys and values may live in one buffer, as past and as present.
    """
    softmax = "softmax" in config.mixers
    length = config.context_length if softmax else UNBOUNDED
    end = list(config.eos_token_ids) or [0]
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if config.needs_positions:
        inputs["position_ids"] = "position_ids"
    decoder = {
        "filename": "model.onnx",
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": config.num_layers,
        "inputs": inputs
        | {
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": LAST_LOGITS,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        "bos_token_id": config.bos_token_id if config.bos_token_id is not None else end[0],
        "eos_token_id": end,
        "pad_token_id": config.pad_token_id if config.pad_token_id is not None else end[0],
        "context_length": length,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": length,
        "num_beams": 1,
        "past_present_share_buffer": shared_cache and softmax,
    }
    return {"model": model, "search": search}


def write_genai_config(config: DecoderConfig, out: Path, *, shared_cache: bool) -> None:
    """Write `out/genai_config.json`."""
    text = json.dumps(genai_config(config, shared_cache=shared_cache), indent=1)
    (out / "genai_config.json").write_text(text + "\n", encoding="utf-8")
