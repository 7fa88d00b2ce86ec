"""Gemma3 against transformers': windows, two rotations, and images whose tokens see each other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from edgekit.errors import UsageError
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder, streamed_logits
from edgekit.models.weights import MemoryStore
from edgekit.sources import Source, open_source
from edgekit.sources.hf import OffsetNorms
from edgekit.sources.hf_config import parse_config
from edgekit.testing_vlm import IMAGE, TinyVlm, tiny_vlm

MAX_ABS = 1e-5
WINDOW = 21  # of the tiny checkpoint's first and last layer
CHANGES: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": WINDOW + 1},
    "sliding layers": {"sliding_layers": (0,)},
    "local rope": {"local_rope": None},
    "embedding scale": {"embedding_scale": 1.0},
    "attention scale": {"attention_scale": None},
    "activation": {"activation": "silu"},
}


@pytest.fixture
def source(tiny_checkpoint: Callable[..., Path]) -> Source:
    return open_source(tiny_checkpoint("gemma3_text"))


@pytest.fixture
def theirs(source: Source) -> Any:
    return AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)


def decoder_of(source: Source, **changes: Any) -> Decoder:
    return Decoder.from_store(replace(source.config, **changes), source.weights)


@torch.inference_mode()
def logits_of(decoder: Decoder, given: torch.Tensor, **options: Any) -> torch.Tensor:
    return decoder(given, **options)[0]


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 150])
@torch.inference_mode()
def test_one_pass(length: int, source: Source, theirs: Any) -> None:
    ids = torch.randint(0, 320, (2, length))
    expected = theirs(ids).logits
    assert (logits_of(decoder_of(source), ids) - expected).abs().max() <= MAX_ABS
    streamed = streamed_logits(source.config, source.weights, ids)
    assert (streamed - expected).abs().max() <= MAX_ABS


@torch.inference_mode()
def test_padded_rows_block_by_block(source: Source, theirs: Any) -> None:
    ids, mask = torch.randint(0, 320, (3, 81)), torch.ones(3, 81, dtype=torch.int64)
    mask[0, :30], mask[1, :13] = 0, 0
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    cache, state, end = DynamicCache(config=theirs.config), None, 0
    decoder = decoder_of(source)
    for size in (50, 1, 1, 25, 1, 3):
        part = slice(end, end + size)
        end += size
        expected = theirs(
            ids[:, part],
            attention_mask=mask[:, :end],
            position_ids=positions[:, part],
            past_key_values=cache,
        ).logits
        logits, state = decoder(ids[:, part], mask=mask[:, :end], state=state)
        tokens = mask[:, part].bool()
        assert (logits - expected)[tokens].abs().max() <= MAX_ABS, end


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_counts(change: str, source: Source) -> None:
    ids = torch.randint(0, 320, (1, 60))
    changed = decoder_of(source, **CHANGES[change])
    assert (logits_of(changed, ids) - logits_of(decoder_of(source), ids)).abs().max() > 0.01


def test_given_embeddings_are_not_scaled(source: Source) -> None:
    decoder, ids = decoder_of(source), torch.randint(0, 320, (1, 30))
    table = source.weights.tensor("model.embed_tokens.weight")
    assert source.config.embedding_scale == 8
    assert torch.equal(logits_of(decoder, 8 * table[ids]), logits_of(decoder, ids))


@pytest.mark.parametrize(
    "wrong", [{"sliding_layers": (3,)}, {"sliding_layers": (0,), "sliding_window": None}], ids=str
)
def test_windows_without_a_layer_or_a_length_are_refused(
    wrong: dict[str, Any], source: Source
) -> None:
    with pytest.raises(UsageError, match="allowed: "):
        replace(source.config, **wrong)


def seen_by_text_half(vlm: TinyVlm, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """The embeddings that the language model is given, and the logits."""
    given = []
    handle = vlm.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.inference_mode():
        logits = vlm.model(**inputs).logits
    handle.remove()
    return given[0], logits


def text_half(vlm: TinyVlm) -> tuple[DecoderConfig, Decoder]:
    config, _ = parse_config(vlm.model.config.text_config.to_dict(), {})
    config = replace(config, reads="embeddings", image_attention="bidirectional")
    tensors = vlm.model.model.language_model.state_dict().items()
    store = OffsetNorms(MemoryStore({f"model.{name}": tensor for name, tensor in tensors}))
    return config, Decoder.from_store(config, store)


@pytest.mark.parametrize("window", [3, 24], ids=["shorter than an image", "longer"])
def test_the_text_half_of_a_model_with_images(window: int) -> None:
    vlm = tiny_vlm("gemma3")
    vlm.model.config.text_config.sliding_window = window
    inputs = vlm.inputs(
        ([5, 6], None, [7, 8, 9, 10, 11]), ([5, 6, 7], None, [8, 9], None, [10, 11, 12, 13])
    )
    mask, image = inputs["attention_mask"], inputs["input_ids"] == IMAGE
    inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    x, expected = seen_by_text_half(vlm, inputs)
    config, decoder = text_half(vlm)
    assert config.sliding_layers == (0,)
    tokens = mask.bool()
    logits = logits_of(decoder, x, mask=mask, image=image)
    assert (logits - expected)[tokens].abs().max() <= MAX_ABS
    causal = Decoder.from_store(
        replace(config, image_attention="causal"), MemoryStore(decoder.state_dict())
    )
    difference = logits_of(causal, x, mask=mask, image=image) - expected
    assert difference[tokens].abs().max() > 1e-3


@torch.inference_mode()
def test_calls_that_cut_no_image_equal_one_pass() -> None:
    vlm = tiny_vlm("gemma3")
    config, decoder = text_half(vlm)
    x, image = torch.randn(2, 40, config.hidden_size), torch.zeros(2, 40, dtype=torch.bool)
    image[0, 3:9] = image[0, 12:20] = image[1, 20:31] = True
    expected, state, end = logits_of(decoder, x, image=image), None, 0
    for size in (12, 8, 15, 1, 4):
        part = slice(end, end + size)
        logits, state = decoder(x[:, part], image=image[:, part], state=state)
        assert (logits - expected[:, part]).abs().max() <= MAX_ABS, end
        end += size
