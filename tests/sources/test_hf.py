import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekit.errors import SourceError, UnsupportedError
from edgekit.models.decoder import Decoder
from edgekit.sources import Source, open_source

Tiny = Callable[..., Path]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.5}
VARIANTS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {}),
    "llama-attention-and-mlp-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 40}),
    "llama-no-grouping": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "gemma3-bias-untied": (
        "gemma3_text",
        {"attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma3-scaled-rope": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LLAMA3}},
    ),
    "gemma3-six-layers-a-pattern": (
        "gemma3_text",
        {"num_hidden_layers": 7, "layer_types": None},
    ),
    "gemma3-bf16": ("gemma3_text", {"dtype": "bfloat16"}),
    "qwen2-bf16": ("qwen2", {"dtype": "bfloat16"}),
    "llama-fp16": ("llama", {"dtype": "float16"}),
    "qwen3-sharded": ("qwen3", {"max_shard_size": "60KB"}),
}


def foreign_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits
    return logits


def our_logits(source: Source, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return Decoder.from_store(source.config, source.weights)(ids)[0]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 320, (2, 150))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(
    variant: str, tiny_checkpoint: Tiny, ids: torch.Tensor
) -> None:
    family, options = VARIANTS[variant]
    source = open_source(tiny_checkpoint(family, **options))
    difference = our_logits(source, ids) - foreign_logits(source.directory, ids)
    assert difference.abs().max() <= 1e-4
    assert source.config.family == family


def test_the_sharded_checkpoint_really_has_shards(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint("qwen3", max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 3


def test_scaled_rope_changes_the_logits(tiny_checkpoint: Tiny, ids: torch.Tensor) -> None:
    plain, scaled = (
        our_logits(open_source(tiny_checkpoint("llama", **options)), ids)
        for options in ({}, {"rope_parameters": LLAMA3})
    )
    assert (plain - scaled).abs().max() > 0.1


def test_stored_tensors_are_read_bit_for_bit(tiny_checkpoint: Tiny) -> None:
    source = open_source(tiny_checkpoint("qwen2", dtype="bfloat16"))
    tensor = source.weights.tensor("model.layers.1.self_attn.k_proj.bias")
    assert tensor.dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.bfloat16)
    assert torch.equal(tensor, model.model.layers[1].self_attn.k_proj.bias)


def test_norms_that_add_one_are_read_with_it(tiny_checkpoint: Tiny) -> None:
    source = open_source(tiny_checkpoint("gemma3_text", dtype="bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.bfloat16).model
    for name, norm in (
        ("norm", model.norm),
        ("layers.1.pre_feedforward_layernorm", model.layers[1].pre_feedforward_layernorm),
        ("layers.2.self_attn.k_norm", model.layers[2].self_attn.k_norm),
    ):
        assert torch.equal(source.weights.tensor(f"model.{name}.weight"), 1 + norm.weight.float())
    projection = source.weights.tensor("model.layers.1.self_attn.o_proj.weight")
    assert torch.equal(projection, model.layers[1].self_attn.o_proj.weight)


def test_identity_changes_with_the_weights(tiny_checkpoint: Tiny) -> None:
    first = open_source(tiny_checkpoint("llama")).identity
    second = open_source(tiny_checkpoint("llama", seed=1)).identity
    assert first["kind"] == "hf-directory"
    assert len(first["sha256"]) == 64
    assert first["sha256"] != second["sha256"]


@pytest.fixture
def damaged(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))


@pytest.fixture
def damaged_shards(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(tiny_checkpoint("llama", max_shard_size="60KB"), tmp_path / "model")
    )


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such source; allowed: a model directory"):
        open_source(tmp_path / "nowhere")


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"empty; a model directory has config\.json"):
        open_source(tmp_path)


def test_directory_without_configuration_is_refused(damaged: Path) -> None:
    (damaged / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json: missing"):
        open_source(damaged)


def test_broken_configuration_is_refused(damaged: Path) -> None:
    (damaged / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(SourceError, match=r"config\.json: not readable as JSON"):
        open_source(damaged)


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000], ids=lambda n: f"keep{n}")
def test_truncated_safetensors_is_refused(damaged: Path, keep: int) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"model\.safetensors: truncated, damaged"):
        open_source(damaged)


def test_corrupted_safetensors_header_is_refused(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"model\.safetensors: truncated, damaged"):
        open_source(damaged)


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickles_are_refused_and_never_opened(damaged: Path, tmp_path: Path, name: str) -> None:
    witness = tmp_path / "opened"
    (damaged / "model.safetensors").unlink()
    torch.save(Bomb(witness), damaged / name)
    with pytest.raises(SourceError, match=r"a pickle can run code|no safetensors file"):
        open_source(damaged)
    assert not witness.exists()


def test_a_single_weight_file_is_refused(damaged: Path) -> None:
    with pytest.raises(SourceError, match=r"a single \.safetensors file given; allowed"):
        open_source(damaged / "model.safetensors")


def test_directory_without_weights_is_refused(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has neither model\.safetensors nor"):
        open_source(damaged)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/outside.safetensors", "a\\b.safetensors", 3]
)
def test_shard_outside_the_directory_is_refused(damaged_shards: Path, shard: Any) -> None:
    index = damaged_shards / "model.safetensors.index.json"
    edit_json(index, weight_map={"model.norm.weight": shard})
    with pytest.raises(SourceError, match="allowed: a file name of this directory"):
        open_source(damaged_shards)


def test_pickled_shard_is_refused(damaged_shards: Path) -> None:
    index = damaged_shards / "model.safetensors.index.json"
    edit_json(index, weight_map={"model.norm.weight": "pytorch_model-00001.bin"})
    with pytest.raises(SourceError, match=r"allowed: \.safetensors files only"):
        open_source(damaged_shards)


def test_missing_shard_is_refused(damaged_shards: Path) -> None:
    sorted(damaged_shards.glob("*.safetensors"))[1].unlink()
    with pytest.raises(SourceError, match="missing, though the index names it"):
        open_source(damaged_shards)


def test_tensor_in_another_shard_than_promised_is_refused(damaged_shards: Path) -> None:
    index = damaged_shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    edit_json(index, weight_map=dict.fromkeys(weight_map, shards[0]))
    with pytest.raises(SourceError, match=r"has no tensor .* which the index promises"):
        open_source(damaged_shards)


def test_index_without_a_map_is_refused(damaged_shards: Path) -> None:
    (damaged_shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(SourceError, match="has no weight_map"):
        open_source(damaged_shards)


def test_remote_code_is_refused_unless_the_family_is_plain(damaged: Path) -> None:
    remote = {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}
    edit_json(damaged / "config.json", auto_map=remote)
    assert "auto_map" in " ".join(open_source(damaged).notes)
    edit_json(damaged / "config.json", architectures=["OtherForCausalLM"])
    with pytest.raises(UnsupportedError, match=r"with code of its own \(auto_map\) given"):
        open_source(damaged)
