"""SPIN in every mixer, against weights that are read through one-hot values.

B batch, T time, H query heads, d head width.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from edgekit.errors import UnsupportedError, UsageError
from edgekit.kernels.head_gate.reference import gated_queries, head_factors
from edgekit.mixers.base import State, TokenMixer
from edgekit.models.config import DecoderConfig, LawcatConfig, LolcatsConfig
from edgekit.models.decoder import Decoder, DecoderLayer, image_mass, step_context
from edgekit.models.spin import SpinConfig
from edgekit.spin import apply
from edgekit.spin.scores import logit_score, visible_keys
from edgekit.testing import TOLERANCE, assert_close
from edgekit.testing_vlm import IMAGE, TinyVlm, language_of, tiny_vlm

BATCH, TIME, WIDTH, HEAD = 2, 30, 48, 32  # fewer tokens than a head is wide
MIXERS = ("softmax", "lawcat", "lolcats")
SPIN = SpinConfig(suppress=3, alpha=0.25)
SUMS = replace(SPIN, score="logit")
SPUN = [*((mixer, SPIN) for mixer in MIXERS), ("softmax", SUMS)]
RATIO = TOLERANCE["float32"]


def config(mixer: str, spin: SpinConfig | None = None, **options: Any) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_layers=1,
        num_heads=6,
        num_kv_heads=2,
        head_dim=HEAD,
        context_length=128,
        mixers=(mixer,),
        lawcat=LawcatConfig(**options),
        lolcats=LolcatsConfig(window=5),
        spin=spin,
    )


def built(mixer: str, spin: SpinConfig | None = None, **options: Any) -> TokenMixer:
    """A mixer with random tensors, the same whatever `spin` is."""
    torch.manual_seed(3)
    found = DecoderLayer(config(mixer, spin, **options), 0).self_attn.eval()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return found


def tokens(rows: str) -> torch.Tensor:
    """`.` text, `o` image."""
    return torch.tensor([[c == "o" for c in row] for row in rows.split()])


PICTURES = tokens("...oooooo.......ooo........... oo............................")
PADDED = tokens("......oooo.................... ..oooo........................")
MASK = torch.ones(BATCH, TIME, dtype=torch.long)
MASK[0, :4] = 0


def given(seed: int = 5) -> torch.Tensor:
    return torch.randn(BATCH, TIME, WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def mixed(
    mixer: TokenMixer,
    x: torch.Tensor,
    image: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    *,
    form: str = "chunked",
    cuts: tuple[int, ...] = (),
) -> torch.Tensor:
    """The heads `[B, T, H d]`, read in pieces that end at `cuts`."""
    pieces, state = [], None
    for start, end in zip((0, *cuts), (*cuts, TIME), strict=True):
        so_far = None if mask is None else mask[:, :end]
        now = None if image is None else image[:, start:end]
        context = step_context(mixer.config, end - start, end, so_far, form, None, now)  # type: ignore[arg-type]
        piece, state = mixer.mix(x[:, start:end], context, state)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def weights(mixer: TokenMixer, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What each head gives to each token, `[B, T, H, T]`: its output where values are one-hot."""
    positions = torch.eye(TIME, HEAD)[None, :, None].expand(BATCH, -1, 2, -1)
    project = mixer.project
    mixer.project = lambda y: (*project(y)[:2], positions)  # type: ignore[method-assign]
    heads = mixed(mixer, x, None, mask).unflatten(-1, (-1, HEAD))
    mixer.project = project  # type: ignore[method-assign]
    return heads[..., :TIME]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("queries", ["text", "last"])
@pytest.mark.parametrize("lowering", ["topk", "rank"])
@pytest.mark.parametrize(("image", "mask"), [(PICTURES, None), (PADDED, MASK)], ids=["", "padded"])
def test_heads_are_turned_down_by_their_weights(
    mixer: str, queries: str, lowering: str, image: torch.Tensor, mask: torch.Tensor | None
) -> None:
    spin = replace(SPIN, queries=queries, lowering=lowering)  # type: ignore[arg-type]
    x, plain = given(), built(mixer)
    mass = (weights(plain, x, mask) * image[:, None, None]).sum(dim=-1)
    assert 0.01 < mass.mean() < 0.9
    gate = gated_queries(image.cumsum(dim=1) > 0, image, queries)  # type: ignore[arg-type]
    factors = head_factors(mass, gate, 3, 0.25, "rank").repeat_interleave(HEAD, dim=-1)
    expected, actual = (
        mixed(plain, x, image, mask) * factors,
        mixed(built(mixer, spin), x, image, mask),
    )
    seen = MASK.bool() if mask is not None else torch.ones_like(MASK).bool()
    assert_close("heads", expected[seen], actual[seen], ratio=RATIO)
    assert not torch.allclose(mixed(plain, x, image, mask)[seen], actual[seen], atol=1e-2)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("spin", [SPIN, SpinConfig(suppress=0)], ids=["spin", "watched"])
@pytest.mark.parametrize(("image", "mask"), [(PICTURES, None), (PADDED, MASK)], ids=["", "padded"])
@torch.no_grad()
def test_masses_are_the_weights_of_images(
    mixer: str, spin: SpinConfig, image: torch.Tensor, mask: torch.Tensor | None
) -> None:
    x, plain, watched = given(), built(mixer), built(mixer)
    watched.spin, masses = spin, []
    context = step_context(plain.config, TIME, TIME, mask, "chunked", None, image)  # type: ignore[arg-type]
    heads, _ = watched.mix(x, replace(context, masses=masses))
    expected = (weights(plain, x, mask) * image[:, None, None]).sum(dim=-1)
    seen = MASK.bool() if mask is not None else torch.ones_like(MASK).bool()
    assert_close("masses", expected[seen], masses[0][seen], ratio=RATIO)
    assert_close("mean", expected.mean(dim=2)[seen], image_mass(masses)[seen], ratio=RATIO)
    unchanged = torch.allclose(heads[seen], mixed(plain, x, image, mask)[seen], atol=1e-4)
    assert unchanged == (spin.suppress == 0)


@pytest.mark.parametrize("queries", ["text", "last"])
@pytest.mark.parametrize("lowering", ["topk", "rank"])
@pytest.mark.parametrize(("image", "mask"), [(PICTURES, None), (PADDED, MASK)], ids=["", "padded"])
@torch.no_grad()
def test_heads_are_turned_down_by_their_logits(
    queries: str, lowering: str, image: torch.Tensor, mask: torch.Tensor | None
) -> None:
    spin = replace(SUMS, queries=queries, lowering=lowering)  # type: ignore[arg-type]
    x, plain = given(), built("softmax")
    rotate = step_context(plain.config, TIME, TIME, mask, "chunked").rotate  # type: ignore[arg-type]
    q, k, _ = plain.project(x)
    q, k = rotate(q).transpose(1, 2), rotate(k).transpose(1, 2)
    visible = visible_keys(None, TIME, TIME, x.device)
    logits = logit_score(q, k, image, visible, HEAD**-0.5).mT
    gate = gated_queries(image.cumsum(dim=1) > 0, image, queries)  # type: ignore[arg-type]
    factors = head_factors(logits, gate, 3, 0.25, "rank").repeat_interleave(HEAD, dim=-1)
    expected = mixed(plain, x, image, mask) * factors
    actual = mixed(built("softmax", spin), x, image, mask)
    seen = MASK.bool() if mask is not None else torch.ones_like(MASK).bool()
    assert_close("heads", expected[seen], actual[seen], ratio=RATIO)
    by_mass = mixed(built("softmax", replace(spin, score="mass")), x, image, mask)
    assert not torch.allclose(by_mass[seen], actual[seen], atol=1e-2)


@torch.no_grad()
def test_the_sum_of_keys_is_a_state_of_constant_size() -> None:
    spun, image = built("softmax", SUMS), PADDED.clone()
    image[0, 2] = True  # a padded place holds no image
    context = step_context(spun.config, TIME, TIME, MASK, "chunked", None, image)  # type: ignore[arg-type]
    state = spun.mix(given(), context)[1]["spin"]
    assert (state.dtype, state.shape) == (torch.float32, (BATCH, 2, HEAD + 1))
    assert state[..., -1].tolist() == [[4.0, 4.0], [4.0, 4.0]]
    assert "spin" not in built("softmax", SPIN).mix(given(), context)[1]


@pytest.mark.parametrize(("mixer", "spin"), SPUN)
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "padded"])
def test_forms_and_pieces_agree(mixer: str, spin: SpinConfig, mask: torch.Tensor | None) -> None:
    image = PICTURES if mask is None else PADDED
    x, spun = given(), built(mixer, spin)
    expected = mixed(spun, x, image, mask)
    seen = torch.ones_like(MASK).bool() if mask is None else mask.bool()
    for form in ("parallel", "recurrent"):
        actual = mixed(spun, x, image, mask, form=form)
        assert_close(form, expected[seen], actual[seen], ratio=RATIO)
    for cuts in ((7,), (5, 17, 18, 29)):
        actual = mixed(spun, x, image, mask, cuts=cuts)
        assert_close(str(cuts), expected[seen], actual[seen], ratio=RATIO)


@pytest.mark.parametrize(("mixer", "spin"), SPUN)
@pytest.mark.parametrize("sharing", ["q_head", "kv_head"])
def test_without_images_nothing_changes(mixer: str, spin: SpinConfig, sharing: str) -> None:
    x = given()
    plain = mixed(built(mixer, state_sharing=sharing), x, None)
    for image in (None, torch.zeros(BATCH, TIME, dtype=torch.bool)):
        actual = mixed(built(mixer, spin, state_sharing=sharing), x, image)
        assert_close("heads", plain, actual, ratio=RATIO)
        if spin.score == "logit":  # values are as they were
            assert torch.equal(plain, actual)


def test_what_changes_nothing_is_left_out() -> None:
    assert config("softmax", SpinConfig(suppress=0)).spin is None
    assert config("softmax", SpinConfig(suppress=3, alpha=1.0)).spin is None
    assert config("softmax", replace(SUMS, suppress=0)).spin is None
    assert config("softmax", SPIN).spin == SPIN


def test_settings_that_a_decoder_cannot_read() -> None:
    for mixer in ("lawcat", "lolcats"):
        with pytest.raises(UnsupportedError, match=f"which {mixer} layers do not have"):
            config(mixer, SUMS)
    with pytest.raises(UsageError, match="normaliser"):
        config("lawcat", SPIN, normaliser=False)
    with pytest.raises(UsageError, match="suppress 6 given for 6 heads"):
        config("softmax", SpinConfig(suppress=6))
    with pytest.raises(UsageError, match="layers 0 to 2 given; allowed: up to 1"):
        config("softmax", replace(SPIN, layers=(0, 2)))


def test_only_chosen_layers_are_gated() -> None:
    spun = replace(config("softmax"), num_layers=3, mixers=("softmax", "lawcat", "softmax"))
    decoder = Decoder(replace(spun, spin=replace(SPIN, layers=(1, 3))))
    assert [layer.self_attn.spin is not None for layer in decoder.layers] == [False, True, True]


@pytest.mark.parametrize("family", ["llava", "llava-gqa"])
@pytest.mark.parametrize("queries", ["text", "last"])
@pytest.mark.parametrize("score", ["mass", "logit"])
@torch.no_grad()
def test_the_decoder_says_what_transformers_says(family: str, queries: str, score: str) -> None:
    vlm = tiny_vlm(family)
    inputs = vlm.inputs(([5, 6], None, [7, 8, 9, 10, 11]), ([5, 6, 7], None, [8], None, [10]))
    caught: dict[str, torch.Tensor] = {}
    hook = vlm.model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: caught.update(x=kwargs["inputs_embeds"]), with_kwargs=True
    )
    spin = SpinConfig(suppress=2, alpha=0.25, score=score, queries=queries)  # type: ignore[arg-type]
    with apply(vlm.model, spin):
        expected = vlm.model(**inputs).logits
    hook.remove()
    decoder = _text_decoder(vlm, spin)
    image, mask = inputs["input_ids"] == IMAGE, inputs["attention_mask"]
    seen = mask.bool()
    whole, _ = decoder(caught["x"], mask=mask, image=image)
    assert_close("logits", expected[seen], whole[seen], ratio=RATIO)
    if queries == "last":  # of each call, and pieces are other calls
        return
    state: list[State] | None = None
    for start, end in ((0, 20), (20, 21), (21, mask.shape[1])):
        now = caught["x"][:, start:end], mask[:, :end], image[:, start:end]
        part, state = decoder(now[0], mask=now[1], image=now[2], state=state)
        rows = seen[:, start:end]
        assert_close("part", expected[:, start:end][rows], part[rows], ratio=RATIO)


def _text_decoder(vlm: TinyVlm, spin: SpinConfig) -> Decoder:
    config, store = language_of(vlm)
    return Decoder.from_store(replace(config, spin=spin), store)
