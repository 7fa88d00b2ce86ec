"""A foreign config.json, parsed once into `DecoderConfig`, or refused with a reason.

Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling` (transformers 4)
and `rope_parameters` (transformers 5). The text half of a Gemma3 with images (`text_config`) is
read as `gemma3_text`.
"""

from collections.abc import Mapping
from typing import Any

from edgekit.errors import SourceError, UnsupportedError, UsageError
from edgekit.models.config import DecoderConfig, RopeConfig

__all__ = ["ARCHITECTURES", "SUPPORTED", "parse_config"]

Json = Mapping[str, Any]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
SUPPORTED = (
    "supported: Llama (SmolLM2 too), Mistral, Qwen2, Qwen3 and Gemma3 causal language models"
)
QWEN3_HEAD_DIM = 128  # what transformers takes when a Qwen3 config does not say
GEMMA3 = "gemma3_text"
GEMMA3_DEFAULTS: Json = {  # likewise; published configs leave most of it out
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
GEMMA3_THETAS = {  # kind of layer: transformers 4's key, and what counts where no key is given
    "full_attention": ("rope_theta", 1e6),
    "sliding_attention": ("rope_local_base_freq", 1e4),
}


def parse_config(config: Json, generation: Json) -> tuple[DecoderConfig, tuple[str, ...]]:
    """Translate a Hugging Face configuration.

    Args:
        config: the contents of config.json.
        generation: the contents of generation_config.json, empty when there is none; its token ids
            come before those of `config`.

    Returns:
        The decoder's configuration, and notes for the user.

    Raises:
        UnsupportedError: if the family, or a setting, is not one that edgekit expresses.
        SourceError: if a key is missing or has an impossible value.
    """
    family = _family(config)
    if family == GEMMA3:
        config = {**GEMMA3_DEFAULTS, **config}
    _refuse_foreign_settings(config, family)
    context, notes = _context_length(config, family)
    if "auto_map" in config:
        notes += ("config.json names remote code (auto_map), which edgekit did not run.",)
    try:
        parsed = DecoderConfig(
            family=family,
            vocab_size=_integer(config, "vocab_size"),
            num_layers=_integer(config, "num_hidden_layers"),
            context_length=context,
            rms_norm_eps=_number(config, "rms_norm_eps", default=1e-6),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            **_widths(config, family),
            **_biases(config, family),
            **(_gemma3(config) if family == GEMMA3 else {"rope": _rope(config)}),
            **_token_ids(config, generation),
        )
    except UsageError as cause:
        raise SourceError(f"config.json: {cause}") from cause
    return parsed, notes


def _family(config: Json) -> str:
    family = str(config.get("model_type"))
    expected = ARCHITECTURES.get(family)
    classes = config.get("architectures") or [expected]
    if expected is None or expected not in classes:
        code = " with code of its own (auto_map)" if "auto_map" in config else ""
        raise UnsupportedError(
            f"model_type {family!r}, architecture {classes[0]!r}{code} given; {SUPPORTED}"
        )
    return family


def _refuse_foreign_settings(config: Json, family: str) -> None:
    """Settings that change the maths in a way the decoder does not have."""
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise UnsupportedError(
            f"quantization_config ({method}) given; supported: plain fp32, fp16 or bf16 weights, "
            "which edgekit compresses itself, or a GGUF file"
        )
    _refuse_activation(config, family)
    kinds = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedError(
            f"layer type {min(kinds)!r} given; supported: full_attention, sliding_attention"
        )
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            raise UnsupportedError(f"{key} {config[key]} given; supported: models without it")


def _refuse_activation(config: Json, family: str) -> None:
    key, allowed = "hidden_act", ["silu", "swish"]
    if family == GEMMA3:
        key, allowed = "hidden_activation", ["gelu_pytorch_tanh"]
    activation = config.get(key, allowed[0])
    if activation not in allowed:
        raise UnsupportedError(f"{key} {activation!r} given; supported: {allowed[0]!r}")


def _context_length(config: Json, family: str) -> tuple[int, tuple[str, ...]]:
    """The model's limit or, where layers slide, the window: up to there full attention is exact."""
    limit = _integer(config, "max_position_embeddings")
    window = config.get("sliding_window")
    if not _slides(config, family) or window is None or window >= limit:
        return limit, ()
    window = _integer(config, "sliding_window")
    note = f"Softmax layers are limited to {window} positions, the model's sliding window."
    return window, (note,)


def _slides(config: Json, family: str) -> bool:
    if family in ("llama", GEMMA3):  # Gemma3's windows are masks
        return False
    if config.get("layer_types"):
        return "sliding_attention" in config["layer_types"]
    if family == "mistral":
        return True
    first = config.get("max_window_layers", 28)
    return bool(config.get("use_sliding_window", False)) and first < config["num_hidden_layers"]


def _widths(config: Json, family: str) -> dict[str, Any]:
    hidden, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    default_kv = (
        heads if family == "llama" or config.get("num_key_value_heads", 0) is None else None
    )
    default_width = QWEN3_HEAD_DIM if family == "qwen3" else hidden // heads
    if config.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise SourceError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    return {
        "hidden_size": hidden,
        "intermediate_size": _integer(config, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": _integer(config, "num_key_value_heads", default=default_kv),
        "head_dim": _integer(config, "head_dim", default=default_width),
    }


def _biases(config: Json, family: str) -> dict[str, Any]:
    everywhere = family in ("llama", "qwen3", GEMMA3) and bool(config.get("attention_bias", False))
    return {
        "qkv_bias": everywhere or family == "qwen2",
        "o_bias": everywhere,
        "mlp_bias": family == "llama" and bool(config.get("mlp_bias", False)),
        "qk_norm": family in ("qwen3", GEMMA3),
    }


def _gemma3(config: Json) -> dict[str, Any]:
    """What sets a Gemma3 decoder apart; its norms' 1 + w is `hf.OffsetNorms`'s."""
    layers = _integer(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if not kinds:
        pattern = _integer(config, "sliding_window_pattern")
        kinds = ["full" if i % pattern == 0 else "sliding" for i in range(1, layers + 1)]
    if len(kinds) != layers:
        raise SourceError(f"config.json: {len(kinds)} layer_types given for {layers} layers")
    sliding = tuple(i for i, kind in enumerate(kinds) if kind.startswith("sliding"))
    return {
        "embedding_scale": _integer(config, "hidden_size") ** 0.5,
        "activation": "gelu_tanh",
        "sandwich_norms": True,
        "attention_scale": _number(config, "query_pre_attn_scalar") ** -0.5,
        "sliding_layers": sliding,
        "sliding_window": _integer(config, "sliding_window") if sliding else None,
        **_gemma3_ropes(config),
    }


def _gemma3_ropes(config: Json) -> dict[str, RopeConfig]:
    """The rotation of full layers and of sliding ones, which do not share a scaling."""
    given = config.get("rope_parameters") or {"full_attention": config.get("rope_scaling")}
    if not GEMMA3_THETAS.keys() >= given.keys():
        raise UnsupportedError(
            f"rope_parameters {sorted(given)} given; supported for Gemma3: a set for each of "
            f"{', '.join(GEMMA3_THETAS)}"
        )
    full, local = (
        _scaled_rope(
            config,
            {"rope_theta": _number(config, key, default=theta), **(given.get(kind) or {})},
        )
        for kind, (key, theta) in GEMMA3_THETAS.items()
    )
    return {"rope": full, "local_rope": local}


def _token_ids(config: Json, generation: Json) -> dict[str, Any]:
    found: dict[str, tuple[int, ...]] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key) if generation.get(key) is None else generation[key]
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and item >= 0 for item in ids):
            raise SourceError(f"config.json: {key} {value!r} given; allowed: a token id or a list")
        found[key] = tuple(ids)
    return {
        "bos_token_id": next(iter(found["bos_token_id"]), None),
        "eos_token_ids": found["eos_token_id"],
        "pad_token_id": next(iter(found["pad_token_id"]), None),
    }


def _rope(config: Json) -> RopeConfig:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise UnsupportedError("rope_parameters differ between layer types; supported: one for all")
    return _scaled_rope(config, {**_only(config, "rope_theta"), **scaling})


def _scaled_rope(config: Json, scaling: Json) -> RopeConfig:
    for where in (config, scaling):
        if where.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise UnsupportedError(
                f"partial_rotary_factor {where['partial_rotary_factor']} given; supported: 1.0"
            )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = _number(scaling, "rope_theta", default=10000.0)
    if kind in ("default", "mrope"):
        return RopeConfig(theta=theta, mrope_section=_sections(scaling))
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=_number(scaling, "factor"))
    if kind == "llama3":
        # transformers lets the configuration's own key win over the one among the scaling factors.
        original = {**scaling, **_only(config, "original_max_position_embeddings")}
        limit = _integer(config, "max_position_embeddings")
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=_number(scaling, "factor"),
            low_freq_factor=_number(scaling, "low_freq_factor"),
            high_freq_factor=_number(scaling, "high_freq_factor"),
            original_context=_integer(original, "original_max_position_embeddings", default=limit),
        )
    raise UnsupportedError(f"rope type {kind!r} given; supported: default, linear, llama3")


def _sections(scaling: Json) -> tuple[int, int, int] | None:
    """Frequencies of each axis of positions (Qwen2-VL); None: positions have one."""
    found = scaling.get("mrope_section")
    if found is None:
        return None
    if not isinstance(found, list | tuple) or len(found) != 3:
        raise SourceError(f"config.json: mrope_section {found!r} given; three numbers are needed")
    time, height, width = (int(size) for size in found)
    return time, height, width


def _only(config: Json, key: str) -> dict[str, Any]:
    return {key: config[key]} if config.get(key) is not None else {}


def _integer(config: Json, key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SourceError(f"config.json: {key} is {value!r}; a whole number above 0 is needed")
    return value


def _number(config: Json, key: str, *, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise SourceError(f"config.json: {key} is {value!r}; a number above 0 is needed")
    return float(value)
