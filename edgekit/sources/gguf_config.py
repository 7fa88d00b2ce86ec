"""The metadata of a GGUF file, told as a Hugging Face configuration."""

from typing import Any

import numpy as np
import torch

from edgekit.errors import SourceError, UnsupportedError
from edgekit.models.config import RopeConfig
from edgekit.models.rope import inverse_frequencies
from edgekit.sources.hf_config import ARCHITECTURES, SUPPORTED, parse_config

__all__ = ["Metadata", "foreign_config", "generation_config"]

FAMILIES = ("llama", "qwen2", "qwen3")  # a Mistral file says llama
# Each multiplies, clamps or masks something that the decoder does not have.
FOREIGN_KEYS = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "pooling_type",
    "residual_scale",
    "rope.dimension_sections",
)
ROPE_FREQS = "rope_freqs.weight"


class Metadata:
    """Typed access to a `gguf.GGUFReader`; keys are given without the architecture's prefix."""

    def __init__(self, reader: Any) -> None:
        """Index the tensors.

        Raises:
            UnsupportedError: if the file is of another architecture, or one part of several.
        """
        self._fields = reader.fields
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.shared("general.architecture", "unknown"))
        if self.architecture not in FAMILIES:
            raise UnsupportedError(f"GGUF architecture {self.architecture!r} given; {SUPPORTED}")
        if self.shared("split.count", 1) > 1:
            raise UnsupportedError("one part of a split GGUF given; join it with llama-gguf-split")

    def shared(self, key: str, default: Any = None) -> Any:
        """The value of `key`, whatever the architecture."""
        return self._fields[key].contents() if key in self._fields else default

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `{architecture}.{key}`."""
        return self.shared(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """The same, required.

        Raises:
            SourceError: if the file does not have it.
        """
        value = self.get(key)
        if value is None:
            raise SourceError(f"the GGUF file has no {self.architecture}.{key}; is it whole?")
        return value

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and KV heads."""
        queries = self.need("attention.head_count")
        return queries, self.get("attention.head_count_kv", queries)


def foreign_config(metadata: Metadata) -> dict[str, Any]:
    """What config.json would say.

    Raises:
        SourceError: if a key is missing.
        UnsupportedError: if a setting is not one edgekit expresses.
    """
    _refuse_foreign_keys(metadata)
    family, tensors = metadata.architecture, metadata.tensors
    heads, kv_heads = metadata.heads
    hidden = metadata.need("embedding_length")
    if "token_embd.weight" not in tensors:
        raise SourceError("the GGUF file has no tensor 'token_embd.weight'; is it whole?")
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": metadata.need("feed_forward_length"),
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": metadata.get("attention.key_length", hidden // heads),
        "max_position_embeddings": metadata.need("context_length"),
        "rms_norm_eps": _decimal(metadata.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(metadata.get("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
        **_sliding_window(metadata),
        **generation_config(metadata),
    }
    if family != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if family == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    config["rope_scaling"] = _rope_scaling(metadata, config)
    parse_config(config, {})
    return config


def generation_config(metadata: Metadata) -> dict[str, Any]:
    """The special token ids, as generation_config.json has them; several ends become a list."""
    ends = [metadata.shared(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    eos = sorted({end for end in ends if end is not None})
    ids = {
        "bos_token_id": metadata.shared("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": metadata.shared("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _refuse_foreign_keys(metadata: Metadata) -> None:
    for key in FOREIGN_KEYS:
        if metadata.get(key) is not None:
            raise UnsupportedError(f"GGUF setting {metadata.architecture}.{key} given; {SUPPORTED}")
    if metadata.get("expert_count", 0):
        raise UnsupportedError(f"a GGUF mixture of experts given; {SUPPORTED}")
    heads, _ = metadata.heads
    if isinstance(heads, list) or isinstance(metadata.need("feed_forward_length"), list):
        raise UnsupportedError(f"a GGUF file with widths that differ by layer given; {SUPPORTED}")
    width = metadata.get("attention.key_length", metadata.need("embedding_length") // heads)
    if metadata.get("attention.value_length", width) != width:
        raise UnsupportedError("a GGUF file whose value heads are not as wide as its key heads")
    rotated = metadata.get("rope.dimension_count", width)
    if rotated != width:
        raise UnsupportedError(f"{rotated} of {width} head columns rotated; supported: all")


def _sliding_window(metadata: Metadata) -> dict[str, Any]:
    window = metadata.get("attention.sliding_window")
    if not window:
        return {}
    if metadata.architecture == "llama":
        return {
            "model_type": "mistral",
            "architectures": [ARCHITECTURES["mistral"]],
            "sliding_window": window,
        }
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}


def _rope_scaling(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type", "none")
    if ROPE_FREQS in metadata.tensors:
        return _llama3_scaling(metadata, config)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _decimal(metadata.need("rope.scaling.factor"))}
    raise UnsupportedError(f"GGUF rope scaling {kind!r} given; supported: none, linear, llama3")


def _llama3_scaling(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Recover the settings from the divisors that a GGUF file stores for each frequency.

    Only the factor varies between published models; that the rest is as usual is checked.
    """
    divisors = torch.from_numpy(np.array(metadata.tensors[ROPE_FREQS].data, dtype=np.float32))
    rope = RopeConfig(
        theta=config["rope_theta"], kind="llama3", factor=round(float(divisors.max()), 3)
    )
    plain = inverse_frequencies(RopeConfig(theta=rope.theta), config["head_dim"])
    expected = plain / inverse_frequencies(rope, config["head_dim"])
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise UnsupportedError(
            f"the GGUF file's {ROPE_FREQS} is not a llama3 scaling; supported: none, linear, llama3"
        )
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }


def _decimal(value: float) -> float:
    """The shortest decimal that has the same fp32 value: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))
