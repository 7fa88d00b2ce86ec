"""A GGUF writer, from a tiny checkpoint to llama.cpp's names and row order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

WriteGguf = Callable[..., Path]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Conversions of test files stay out of the user's cache."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write_gguf() -> WriteGguf:
    """`write_gguf(checkpoint, out, quantization=..., pre=..., extra=...)` writes a GGUF file."""
    return _write_gguf


def _write_gguf(
    checkpoint: Path,
    out: Path,
    *,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str | None = None,
    tokenizer_model: str = "gpt2",
    pre: str = "smollm",
    tensors: dict[str, np.ndarray] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(out, architecture or config["model_type"])
    _add_settings(writer, config)
    _add_tokenizer(writer, checkpoint, tokenizer_model, pre)
    for key, value in (extra or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key, value)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        rows = _reordered(name, tensor, config).float().numpy()
        kind = quantization if rows.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(rows, kind)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=kind)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, model: str, pre: str) -> None:
    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {token["id"] for token in stored["added_tokens"]}
    vocab = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].get)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if i in special else 1 for i in range(len(vocab))])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template((checkpoint / "chat_template.jinja").read_text())


def _gguf_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{leaf}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{leaf}"


def _reordered(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp keeps a Llama's rotary pairs side by side."""
    if config["model_type"] != "llama" or not ("q_proj" in name or "k_proj" in name):
        return tensor
    key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
    halves = tensor.reshape(config[key], 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
