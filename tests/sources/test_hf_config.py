from typing import Any

import pytest

from edgekit.errors import SourceError, UnsupportedError
from edgekit.models.config import RopeConfig
from edgekit.sources.hf_config import ARCHITECTURES, parse_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    base = {
        "model_type": family,
        "architectures": [ARCHITECTURES.get(family, "OtherForCausalLM")],
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return {key: value for key, value in {**base, **changes}.items() if value != "absent"}


ROPES = {
    "absent": ({}, RopeConfig()),
    "v4-default": ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
    "v4-linear": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
        RopeConfig(theta=5e5, kind="linear", factor=4.0),
    ),
    "v4-llama3": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                **LLAMA3,
                "rope_type": "llama3",
                "original_max_position_embeddings": 256,
            },
        },
        RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_context=256),
    ),
    "v5-default": (
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        RopeConfig(theta=1e6),
    ),
    "v5-llama3-original-context-from-limit": (
        {"rope_parameters": {**LLAMA3, "rope_theta": 1e6, "rope_type": "llama3"}},
        RopeConfig(theta=1e6, kind="llama3", factor=8.0, original_context=512),
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope(case: str) -> None:
    keys, expected = ROPES[case]
    assert parse_config(config(**keys), {})[0].rope == expected


WINDOWS = {
    "mistral": (config("mistral", sliding_window=128), 128),
    "mistral-null": (config("mistral", sliding_window=None), 512),
    "mistral-window-beyond-limit": (config("mistral", sliding_window=4096), 512),
    "qwen2-off": (config("qwen2", sliding_window=128, use_sliding_window=False), 512),
    "qwen2-on": (
        config("qwen2", sliding_window=128, use_sliding_window=True, max_window_layers=1),
        128,
    ),
    "qwen2-no-layer-slides": (
        config("qwen2", sliding_window=128, use_sliding_window=True, max_window_layers=3),
        512,
    ),
    "qwen3-layer-types": (
        config(
            "qwen3",
            sliding_window=100,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        100,
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_sliding_window_limits_the_context_and_says_so(case: str) -> None:
    foreign, context = WINDOWS[case]
    parsed, notes = parse_config(foreign, {})
    assert parsed.context_length == context
    assert bool(notes) == (context < 512)
    assert all(str(context) in note for note in notes)


GEMMA3 = {"full": "full_attention", "sliding": "sliding_attention"}
GEMMA3_ROPES = {
    "absent": ({}, RopeConfig(theta=1e6), RopeConfig()),
    "v4": (
        {
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        RopeConfig(theta=5e5, kind="linear", factor=8.0),
        RopeConfig(theta=2e4),
    ),
    "v5": (
        {
            "rope_parameters": {
                GEMMA3["full"]: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                GEMMA3["sliding"]: {"rope_type": "default", "rope_theta": 2e4},
            }
        },
        RopeConfig(theta=5e5, kind="linear", factor=8.0),
        RopeConfig(theta=2e4),
    ),
    "v5-of-one-kind": (
        {"rope_parameters": {GEMMA3["full"]: {"rope_type": "default"}}},
        RopeConfig(theta=1e6),
        RopeConfig(),
    ),
}


@pytest.mark.parametrize("case", GEMMA3_ROPES)
def test_gemma3_rotates_in_two_ways(case: str) -> None:
    keys, full, local = GEMMA3_ROPES[case]
    parsed, _ = parse_config(config("gemma3_text", **keys), {})
    assert (parsed.rope, parsed.local_rope) == (full, local)


GEMMA3_LAYERS = {
    "types": ({"layer_types": [GEMMA3["full"], GEMMA3["sliding"], GEMMA3["full"]]}, (1,)),
    "default-pattern": ({"num_hidden_layers": 8}, (0, 1, 2, 3, 4, 6, 7)),
    "pattern": ({"sliding_window_pattern": 2}, (0, 2)),
    "none": ({"sliding_window_pattern": 1, "sliding_window": None}, ()),
}


@pytest.mark.parametrize("case", GEMMA3_LAYERS)
def test_gemma3_slides_and_keeps_its_whole_context(case: str) -> None:
    keys, sliding = GEMMA3_LAYERS[case]
    parsed, notes = parse_config(config("gemma3_text", **{"sliding_window": 20, **keys}), {})
    assert parsed.sliding_layers == sliding
    assert parsed.sliding_window == (20 if sliding else None)
    assert (parsed.context_length, notes) == (512, ())


def test_what_a_published_gemma3_leaves_out() -> None:
    """The text_config of gemma-3-4b-it has these keys and a scaled rope."""
    published = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    parsed, _ = parse_config(published, {})
    assert (parsed.num_heads, parsed.num_kv_heads, parsed.head_dim) == (8, 4, 256)
    assert (parsed.vocab_size, parsed.context_length) == (262208, 131072)
    assert parsed.sliding_layers == tuple(i for i in range(34) if i % 6 != 5)
    assert parsed.embedding_scale == 2560**0.5
    assert parsed.logit_scale == 1 / 16
    assert parsed.tied_head
    assert parsed.qk_norm


EOS = {
    "integer": (config(eos_token_id=2), {}, (2,)),
    "list": (config(eos_token_id=[2, 7]), {}, (2, 7)),
    "generation-config-first": (config(eos_token_id=2), {"eos_token_id": [5, 2]}, (5, 2)),
    "generation-config-null": (config(eos_token_id=2), {"eos_token_id": None}, (2,)),
    "none": (config(), {}, ()),
    "zero": (config(eos_token_id=0), {}, (0,)),
}


@pytest.mark.parametrize("case", EOS)
def test_eos(case: str) -> None:
    foreign, generation, expected = EOS[case]
    assert parse_config(foreign, generation)[0].eos_token_ids == expected


def test_head_width_defaults() -> None:
    assert parse_config(config(), {})[0].head_dim == 16
    assert parse_config(config(head_dim=40), {})[0].head_dim == 40
    assert parse_config(config("qwen3"), {})[0].head_dim == 128


UNSUPPORTED = {
    "another-family": (config("gpt2"), "model_type 'gpt2'.*supported: Llama"),
    "mixture-of-experts": (config("qwen3_moe"), "model_type 'qwen3_moe'"),
    "no-family": (config(model_type="absent"), "model_type 'None'"),
    "classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        "architecture 'LlamaForSequenceClassification' given",
    ),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "gptq.*plain fp32"),
    "activation": (config(hidden_act="gelu"), "hidden_act 'gelu' given; supported: 'silu'"),
    "gemma3-activation": (
        config("gemma3_text", hidden_activation="gelu"),
        "hidden_activation 'gelu' given; supported: 'gelu_pytorch_tanh'",
    ),
    "gemma3-attention-cap": (
        config("gemma3_text", attn_logit_softcapping=50.0),
        r"attn_logit_softcapping 50\.0 given",
    ),
    "gemma3-final-cap": (
        config("gemma3_text", final_logit_softcapping=30.0),
        r"final_logit_softcapping 30\.0 given",
    ),
    "gemma3-encoder": (
        config("gemma3_text", use_bidirectional_attention=True),
        "use_bidirectional_attention True given",
    ),
    "gemma3-one-rope": (
        config("gemma3_text", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "a set for each of full_attention, sliding_attention",
    ),
    "layer-type": (config("qwen3", layer_types=["linear_attention"] * 3), "layer type"),
    "yarn": (config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope type 'yarn'"),
    "dynamic": (config(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope type 'dynamic'"),
    "longrope": (config(rope_parameters={"rope_type": "longrope"}), "rope type 'longrope'"),
    "partial-rotary": (config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "partial-rotary-v5": (
        config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25}),
        "partial_rotary_factor 0.25",
    ),
    "rope-per-layer-type": (
        config(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "differ between layer types",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_the_decoder_cannot_express_is_refused_in_one_line(case: str) -> None:
    foreign, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedError, match=message) as caught:
        parse_config(foreign, {})
    assert "\n" not in str(caught.value)


BROKEN = {
    "missing-key": (config(hidden_size="absent"), "hidden_size is None"),
    "text-for-a-number": (config(num_hidden_layers="3"), "num_hidden_layers is '3'"),
    "zero-heads": (config(num_attention_heads=0), "num_attention_heads is 0"),
    "uneven-groups": (config(num_key_value_heads=3), "not a multiple of num_kv_heads"),
    "uneven-heads": (config(hidden_size=66), "not a multiple of num_attention_heads"),
    "eos-text": (config(eos_token_id="</s>"), "eos_token_id '</s>' given"),
    "no-factor": (config(rope_scaling={"type": "linear"}), "factor is None"),
    "theta": (config(rope_theta=-1.0), "rope_theta is -1.0"),
    "gemma3-window": (config("gemma3_text", sliding_window=None), "sliding_window is None"),
    "gemma3-layers": (
        config("gemma3_text", layer_types=["full_attention"]),
        "1 layer_types given for 3 layers",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_impossible_values_are_refused_by_name(case: str) -> None:
    foreign, message = BROKEN[case]
    with pytest.raises(SourceError, match=message):
        parse_config(foreign, {})
