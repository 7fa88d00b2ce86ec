from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgekit.errors import SourceError, UnsupportedError
from edgekit.models.decoder import with_fresh_mixers
from edgekit.models.weights import MemoryStore, OverlayStore
from edgekit.sources import Source, check_weights, open_source

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def source(tiny_checkpoint: Callable[..., Path]) -> Source:
    return open_source(tiny_checkpoint("llama"))


def with_tensor(source: Source, name: str, tensor: torch.Tensor) -> OverlayStore:
    return OverlayStore(MemoryStore({name: tensor}), source.weights)


def test_a_missing_tensor_is_named(source: Source) -> None:
    held = {name: source.weights.tensor(name) for name in source.weights}
    del held["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(SourceError, match=r"no tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        check_weights(source.config, MemoryStore(held))


def test_a_misshapen_tensor_is_named(source: Source) -> None:
    store = with_tensor(source, "model.norm.weight", torch.ones(65))
    with pytest.raises(SourceError, match=r"'model\.norm\.weight' is \[65\], .* asks for \[64\]"):
        check_weights(source.config, store)


def test_integer_weights_are_refused(source: Source) -> None:
    store = with_tensor(source, "model.norm.weight", torch.ones(64, dtype=torch.int8))
    with pytest.raises(UnsupportedError, match="is int8; supported: float32"):
        check_weights(source.config, store)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.3.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_would_change_the_maths_is_refused(source: Source, name: str) -> None:
    with pytest.raises(UnsupportedError, match="has no place in this decoder"):
        check_weights(source.config, with_tensor(source, name, torch.ones(64)))


def test_harmless_extra_tensors_are_ignored(source: Source) -> None:
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    check_weights(source.config, with_tensor(source, frequencies, torch.ones(8)))
    head = source.weights.tensor(EMBEDDING).clone()
    check_weights(source.config, with_tensor(source, "lm_head.weight", head))


def test_a_tied_head_that_differs_is_refused(source: Source) -> None:
    head = source.weights.tensor(EMBEDDING) + 1
    with pytest.raises(UnsupportedError, match="tie_word_embeddings is true, but"):
        check_weights(source.config, with_tensor(source, "lm_head.weight", head))


def test_an_untied_head_must_be_there(source: Source) -> None:
    config = replace(source.config, tied_head=False)
    with pytest.raises(SourceError, match=r"no tensor 'lm_head\.weight'"):
        check_weights(config, source.weights)


def test_student_tensors_are_expected_where_a_layer_has_a_student(source: Source) -> None:
    config = replace(source.config, mixers=("softmax", "lawcat", "softmax"))
    with pytest.raises(SourceError, match=r"no tensor 'model\.layers\.1\.self_attn\.conv_q"):
        check_weights(config, source.weights)
    check_weights(config, with_fresh_mixers(config, source.weights))
