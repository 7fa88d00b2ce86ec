"""SPIN in transformers' models against what eager attention says of them."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgekit.errors import UnsupportedError, UsageError
from edgekit.spin import SpinConfig, apply
from edgekit.testing import TOLERANCE, assert_close
from edgekit.testing_vlm import IMAGE, TINY_VLMS, TinyVlm, tiny_vlm

FAMILIES = tuple(TINY_VLMS)
HEADS, KEPT, ALPHA = 4, 2, 0.25
Row = Sequence[Sequence[int] | None]
ONE: Row = ([5, 6], None, [7, 8, 9, 10, 11])
TWO: Row = ([5, 6, 7], None, [8, 9], None, [10, 11])
RATIO = TOLERANCE["float32"]


@pytest.fixture(params=FAMILIES)
def vlm(request: pytest.FixtureRequest) -> TinyVlm:
    return copy.deepcopy(_shared(request.param))


@functools.cache
def _shared(family: str) -> TinyVlm:
    return tiny_vlm(family)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


@torch.no_grad()
def expected_logits(
    model: Any, inputs: dict[str, torch.Tensor], gate: torch.Tensor
) -> torch.Tensor:
    """Layer by layer: the weights of eager attention say which heads the next pass turns down."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    outputs = [
        module for name, module in eager.named_modules() if name.endswith("self_attn.o_proj")
    ]
    outputs = outputs[-eager.config.get_text_config().num_hidden_layers :]
    image = (inputs["input_ids"] == IMAGE)[:, None, None, :]
    for layer, output in enumerate(outputs):
        weights = eager(**inputs, output_attentions=True).attentions[layer]
        mass = (weights * image).sum(dim=-1)  # [B, H, T]
        worst = mass.topk(HEADS - KEPT, dim=1, largest=False).indices
        factors = torch.ones_like(mass).scatter(1, worst, ALPHA)
        factors = torch.where(gate[:, None], factors, 1.0).mT.repeat_interleave(16, dim=-1)
        output.register_forward_pre_hook(lambda _, args, factors=factors: (args[0] * factors,))
    return eager(**inputs).logits


def text_gate(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    image = inputs["input_ids"] == IMAGE
    return ~image & (image.cumsum(dim=1) > 0)


def config(**options: Any) -> SpinConfig:
    return SpinConfig(**{"suppress": HEADS - KEPT, "alpha": ALPHA, **options})


@pytest.mark.parametrize("rows", [(ONE,), (ONE, TWO)], ids=["one image", "padded rows"])
@pytest.mark.parametrize("queries", ["text", "last"])
def test_mass_as_eager_attention_weighs_it(
    vlm: TinyVlm, rows: tuple[Row, ...], queries: str
) -> None:
    inputs = vlm.inputs(*rows)
    gate = text_gate(inputs)
    if queries == "last":
        gate[:, :-1] = False
    expected = expected_logits(vlm.model, inputs, gate)
    plain = logits(vlm.model, inputs)
    with apply(vlm.model, config(queries=queries)):
        actual = logits(vlm.model, inputs)
    seen = inputs["attention_mask"].bool()  # what padding says is nobody's business
    assert_close("logits", expected[seen], actual[seen], ratio=RATIO)
    assert not torch.allclose(actual[seen], plain[seen], atol=1e-2)


@torch.no_grad()
def test_logit_score_sums_what_attention_sees(vlm: TinyVlm) -> None:
    inputs = vlm.inputs(ONE)
    found: dict[int, torch.Tensor] = {}
    with (
        apply(vlm.model, config(score="logit", alpha=1.0)) as spin,
        spin.observed(lambda layer, scores, _: found.__setitem__(layer, scores)),
    ):
        logits(vlm.model, inputs)
    image = inputs["input_ids"][0] == IMAGE
    for layer, (query, key, scale) in enumerate(queries_and_keys(vlm.model, inputs)):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[0, :, image]
        expected = scale * (query[0, :, -1:] @ keys.mT).sum(dim=-1)[:, 0]
        assert_close("score", expected, found[layer][0, -1], ratio=RATIO)


def queries_and_keys(
    model: Any, inputs: dict[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """What each layer's attention is given."""
    given = []

    def spy(module: nn.Module, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        given.append((query, key, kwargs["scaling"]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    ALL_MASK_ATTENTION_FUNCTIONS.register("spy", sdpa_mask)
    model.config.get_text_config(decoder=True)._attn_implementation = "spy"
    model(**inputs)
    return given


@pytest.mark.parametrize("score", ["mass", "logit"])
def test_no_image_no_head_or_alpha_one_is_the_plain_model(vlm: TinyVlm, score: str) -> None:
    for rows, options in (
        ([([5, 6, 7],)], {}),
        ([ONE, TWO], {"suppress": 0}),
        ([ONE, TWO], {"alpha": 1.0}),
    ):
        inputs = vlm.inputs(*rows)
        plain = logits(vlm.model, inputs)
        with apply(vlm.model, config(score=score, **options)):
            assert torch.equal(logits(vlm.model, inputs), plain)
        assert torch.equal(logits(vlm.model, inputs), plain)  # and nothing stays behind


def test_rows_are_gated_each_for_itself(vlm: TinyVlm) -> None:
    both = vlm.inputs(ONE, TWO)
    pixels = _split_pixels(vlm, both)
    with apply(vlm.model, config()):
        together = logits(vlm.model, both)[:, -1]
        for i, row in enumerate((ONE, TWO)):
            alone = logits(vlm.model, vlm.inputs(row) | pixels[i])[0, -1]
            assert_close("row", alone, together[i], ratio=RATIO)


def _split_pixels(vlm: TinyVlm, both: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The pixels of a row with one image and of a row with two."""
    pixels = both["pixel_values"]
    if vlm.family == "smolvlm":
        return [{"pixel_values": pixels[:1, :1]}, {"pixel_values": pixels[1:]}]
    each = len(pixels) // 3
    return [{"pixel_values": pixels[:each]}, {"pixel_values": pixels[each:]}]


@torch.no_grad()
def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    found = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)
    return found[:, inputs["input_ids"].shape[1] :]


def test_decoding_is_the_whole_text_at_once(vlm: TinyVlm) -> None:
    """The gate of text queries does not ask where a call begins."""
    inputs = vlm.inputs(ONE, TWO)
    with apply(vlm.model, config()):
        tokens = generated(vlm.model, inputs)
        longer = dict(inputs)
        for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                added = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                new = added.get(name, torch.zeros_like(tokens)).to(inputs[name].dtype)
                longer[name] = torch.cat((inputs[name], new), dim=1)
        whole = logits(vlm.model, longer)[:, -9:-1]
    assert torch.equal(whole.argmax(dim=-1), tokens)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_takes_every_cache_and_beams(vlm: TinyVlm, cache: str | None) -> None:
    inputs = vlm.inputs(ONE)
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    with apply(vlm.model, config()):
        reference = generated(vlm.model, inputs, use_cache=False)
        assert torch.equal(generated(vlm.model, inputs, **options), reference)
        beams = generated(vlm.model, inputs, num_beams=3, **options)
        assert torch.equal(generated(vlm.model, inputs, num_beams=3, use_cache=False), beams)


def test_last_queries_depend_on_where_a_call_ends() -> None:
    vlm = tiny_vlm("llava")
    inputs = vlm.inputs(ONE)
    cut = inputs["input_ids"].shape[1] - 2
    first = {name: value[:, :cut] for name, value in inputs.items() if value.ndim == 2}
    first["pixel_values"] = inputs["pixel_values"]
    rest = inputs["input_ids"][:, cut:]
    for queries, alike in (("text", True), ("last", False)):
        with apply(vlm.model, config(queries=queries)), torch.no_grad():
            whole = vlm.model(**inputs).logits[:, -1]
            cache = vlm.model(**first, use_cache=True).past_key_values
            mask = inputs["attention_mask"]
            parts = vlm.model(input_ids=rest, attention_mask=mask, past_key_values=cache)
        assert torch.allclose(parts.logits[:, -1], whole, atol=1e-4) is alike


def test_embeddings_need_to_be_told_of_images() -> None:
    vlm = tiny_vlm("llava")
    inputs = vlm.inputs(ONE)
    caught: dict[str, torch.Tensor] = {}
    hook = vlm.model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: caught.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with apply(vlm.model, config()) as spin, torch.no_grad():
        expected = vlm.model(**inputs).logits
        hook.remove()
        given = {"inputs_embeds": caught["embeds"], "attention_mask": inputs["attention_mask"]}
        with pytest.raises(UsageError, match="say where images lie"):
            vlm.model(**given)
        spin.given(inputs["input_ids"] == IMAGE)
        assert torch.equal(vlm.model(**given).logits, expected)


def test_settings_may_change_between_calls() -> None:
    vlm = tiny_vlm("llava")
    inputs = vlm.inputs(ONE)
    with apply(vlm.model, config()) as spin:
        first = logits(vlm.model, inputs)
        spin.config = config(layers=(1, 2), lowering="rank")
        assert not torch.equal(logits(vlm.model, inputs), first)
        spin.config = config(lowering="rank")
        assert torch.equal(logits(vlm.model, inputs), first)
        with pytest.raises(UsageError, match="layers 0 to 9"):
            spin.config = config(layers=(0, 9))
        assert torch.equal(logits(vlm.model, inputs), first)


def test_models_that_spin_cannot_serve() -> None:
    vlm = tiny_vlm("llava")
    with pytest.raises(UsageError, match="suppress 4 given for 4 heads"):
        apply(vlm.model, config(suppress=4))
    with apply(vlm.model, config()), pytest.raises(UsageError, match="already on"):
        apply(vlm.model, config())
    with pytest.raises(UnsupportedError, match="names no image token"):
        apply(vlm.model.model.language_model, config())
    vlm.model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="SPIN needs 'sdpa'"):
        apply(vlm.model, config())
