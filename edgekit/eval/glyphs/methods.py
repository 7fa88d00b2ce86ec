"""What is compared on the glyph world: SPIN, its controls, and a contrast of two passes."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from edgekit.eval.chair import Captioned
from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.lawcat import LawcatModel, Ranking
from edgekit.eval.glyphs.model import Model, prompt
from edgekit.models.spin import SpinConfig
from edgekit.spin.torch_form import apply

__all__ = [
    "NEW_TOKENS",
    "Control",
    "Method",
    "contrasted_captions",
    "next_logits",
    "plain_captions",
    "said",
    "spun_captions",
    "turned_down",
]

Control = Literal["none", "random", "inverted"]
NEW_TOKENS = 16
CONTRAST_NOISE, PLAUSIBLE = 2.0, 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to caption.

    Attributes:
        spin: SPIN's settings; None: the plain model.
        control: what the heads are ranked by instead of their score: chance, or its opposite.
        seed: of chance.
    """

    spin: SpinConfig | None = None
    control: Control = "none"
    seed: int = 0


@torch.no_grad()
def spun_captions(model: Model, pixels: torch.Tensor, method: Method) -> list[list[int]]:
    """Greedy captions of pictures `[N, 3, SIDE, SIDE]`, as tokens after `BOS WITH`."""
    with turned_down(model, method):
        return plain_captions(model, pixels)


@torch.no_grad()
def plain_captions(model: Model, pixels: torch.Tensor) -> list[list[int]]:
    """The same of a model as it is."""
    ids = prompt(len(pixels))
    if isinstance(model, LawcatModel):
        found = model.continued(ids, pixels, NEW_TOKENS)
    else:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        found = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    return [_until_end(row) for row in found[:, ids.shape[1] :].tolist()]


@torch.no_grad()
def next_logits(
    model: Model, pixels: torch.Tensor, caption: Sequence[int], method: Method
) -> torch.Tensor:
    """Logits `[V]` of what follows the beginning of a caption of one picture `[3, SIDE, SIDE]`."""
    begun = torch.tensor([caption], dtype=torch.long)
    with turned_down(model, method):
        given = {"input_ids": torch.cat((prompt(1), begun), dim=1), "pixel_values": pixels[None]}
        logits: torch.Tensor = model(**given).logits[0, -1]
    return logits


@torch.no_grad()
def contrasted_captions(
    model: Model, pixels: torch.Tensor, *, strength: float, seed: int = 0
) -> list[list[int]]:
    """Captions by contrast with a noised picture (VCD, arXiv 2311.16922), in two passes a token.

    Next token: argmax of (1 + a) l - a l', among those whose probability is at least a tenth of the
    likeliest's.
    """
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    noised = pixels + CONTRAST_NOISE * noise
    tokens = prompt(len(pixels))
    for _ in range(NEW_TOKENS):
        plain, other = (
            model(input_ids=tokens, pixel_values=p).logits[:, -1] for p in (pixels, noised)
        )
        floor = plain.amax(dim=-1, keepdim=True) + torch.tensor(PLAUSIBLE).log()
        contrast = (1 + strength) * plain - strength * other
        contrast[:, world.IMAGE] = -torch.inf  # after its end a caption may go on with anything
        chosen = contrast.masked_fill(plain < floor, -torch.inf).argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, chosen), dim=1)
    return [_until_end(row) for row in tokens[:, world.PATCHES + 2 :].tolist()]


def said(tokens: Sequence[int], drawn: Sequence[int]) -> Captioned:
    """A caption as CHAIR reads it; objects are their numbers."""
    mentions = tuple(str(token) for token in tokens if token < world.OBJECTS)
    return Captioned(truth=frozenset(map(str, drawn)), mentions=mentions, words=len(tokens))


@contextlib.contextmanager
def turned_down(model: Model, method: Method) -> Iterator[None]:
    """SPIN, or a control of it, while the context lasts."""
    if method.spin is None:
        yield
        return
    if isinstance(model, LawcatModel):
        with model.turned_down(method.spin, _ranking(method)):
            yield
        return
    with apply(model, replace(method.spin, image_token_ids=(world.IMAGE,))) as spin:
        spin.ranking = _ranking(method)
        yield


def _ranking(method: Method) -> Ranking | None:
    """What the heads are ranked by, out of their scores; None: the scores themselves."""
    if method.control == "inverted":
        return lambda scores: 1 - scores
    if method.control == "random":
        random = torch.Generator().manual_seed(method.seed)
        return lambda scores: torch.rand(scores.shape, generator=random)
    return None


def _until_end(tokens: list[Any]) -> list[int]:
    return tokens[: tokens.index(world.EOS)] if world.EOS in tokens else tokens
