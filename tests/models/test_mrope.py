"""Positions of three axes: our decoder against Qwen2-VL's own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    apply_multimodal_rotary_pos_emb,
)

from edgekit.errors import UsageError
from edgekit.models.config import RopeConfig
from edgekit.models.decoder import Decoder
from edgekit.models.rope import apply_rope, rope_tables
from edgekit.testing_vlm import TinyVlm, language_of, tiny_vlm

MAX_ABS = 1e-5
PROMPT, FOLLOWING = ([5, 6, 7], None, [8, 9, 10, 11], None, [12]), [13, 14, 15]


@pytest.fixture(scope="module", params=["qwen2-vl", "qwen2.5-vl"])
def vlm(request: pytest.FixtureRequest) -> TinyVlm:
    return tiny_vlm(request.param)


@pytest.fixture(scope="module")
def call(vlm: TinyVlm) -> dict[str, torch.Tensor]:
    """Embeddings, mask and positions of two rows, one padded on the left, and what follows them."""
    given = vlm.inputs(PROMPT, ([20, 21], None, [22]))
    following = torch.tensor([FOLLOWING] * 2)
    given["input_ids"] = torch.cat((given["input_ids"], following), dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        given[name] = torch.cat((given[name], torch.full_like(following, value)), dim=1)
    pixels = given.pop("pixel_values")
    positions, _ = vlm.model.model.get_rope_index(**given)
    with torch.no_grad():
        pictures = vlm.model.model.get_image_features(pixels, given["image_grid_thw"])
        x = vlm.model.get_input_embeddings()(given["input_ids"])
    lies = given["mm_token_type_ids"].bool()
    x[lies] = torch.cat(pictures.pooler_output)
    return {"x": x, "mask": given["attention_mask"], "positions": positions}


@torch.no_grad()
def expected(vlm: TinyVlm, call: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = vlm.model(
        inputs_embeds=call["x"], attention_mask=call["mask"], position_ids=call["positions"]
    ).logits
    return found


def test_tables_are_those_of_transformers(vlm: TinyVlm) -> None:
    text = vlm.model.config.text_config
    rope = language_of(vlm)[0].rope
    assert rope.mrope_section == (2, 3, 3)
    q, k = torch.randn(2, 2, 5, 4, 16)
    positions = torch.randint(0, 200, (3, 2, 5))
    cos, sin = Qwen2VLRotaryEmbedding(text)(q, positions)
    theirs = apply_multimodal_rotary_pos_emb(q, k, cos, sin, [2, 3, 3], unsqueeze_dim=2)
    ours = rope_tables(rope, 16, positions)
    for x, rotated in zip((q, k), theirs, strict=True):
        assert (apply_rope(x, *ours) - rotated).abs().max() <= 1e-6


def test_a_prompt_in_one_call(vlm: TinyVlm, call: dict[str, torch.Tensor]) -> None:
    decoder = Decoder.from_store(*language_of(vlm))
    tokens = call["mask"].bool()
    given: dict[str, Any] = {"mask": call["mask"], "positions": call["positions"]}
    with torch.inference_mode():
        logits, _ = decoder(call["x"], **given)
        counted, _ = decoder(call["x"], mask=call["mask"])
    reference = expected(vlm, call)
    assert (logits - reference)[tokens].abs().max() <= MAX_ABS
    assert (counted - reference)[tokens].abs().max() > 100 * MAX_ABS


def test_token_by_token(vlm: TinyVlm, call: dict[str, torch.Tensor]) -> None:
    decoder, state = Decoder.from_store(*language_of(vlm)), None
    time, end = call["x"].shape[1], 0
    reference = expected(vlm, call)
    for size in (time - len(FOLLOWING), *(1,) * len(FOLLOWING)):
        part = slice(end, end + size)
        end += size
        with torch.inference_mode():
            logits, state = decoder(
                call["x"][:, part],
                mask=call["mask"][:, :end],
                positions=call["positions"][:, :, part],
                state=state,
            )
        assert (logits[:, -1] - reference[:, end - 1]).abs().max() <= MAX_ABS


def test_text_needs_no_positions(vlm: TinyVlm) -> None:
    decoder = Decoder.from_store(*language_of(vlm))
    ids = torch.randint(3, 290, (2, 9))
    with torch.no_grad():
        theirs = vlm.model(input_ids=ids).logits
        counted, _ = decoder(ids)
        same, _ = decoder(ids, positions=torch.arange(9).expand(3, 2, 9))
        flat, _ = decoder(ids, positions=torch.arange(9).expand(2, 9))
    assert (counted - theirs).abs().max() <= MAX_ABS
    assert torch.equal(counted, same)
    assert torch.equal(counted, flat)


def test_layers_without_rotation_read_no_positions(vlm: TinyVlm) -> None:
    decoder = Decoder.from_store(*language_of(vlm, ("lawcat", "lawcat")))
    ids = torch.randint(3, 290, (2, 9))
    with torch.inference_mode():
        counted, _ = decoder(ids)
        moved, _ = decoder(ids, positions=torch.randint(0, 50, (3, 2, 9)))
    assert torch.equal(counted, moved)


def test_what_is_refused(vlm: TinyVlm) -> None:
    config, store = language_of(vlm)
    with pytest.raises(UsageError, match=r"mrope_section \(2, 3, 4\) given; allowed: sizes of 8"):
        replace(config, rope=replace(config.rope, mrope_section=(2, 3, 4)))
    plain = Decoder.from_store(replace(config, rope=RopeConfig()), store)
    with pytest.raises(UsageError, match=r"positions \[3, 1, 4\] given; allowed: \[B, T\]"):
        plain(torch.zeros(1, 4, dtype=torch.int64), positions=torch.zeros(3, 1, 4))
