"""Ways to answer about pictures: plainly, with SPIN or its controls, and by contrast.

All go through one loop, many pictures at a time, so that their costs can be compared. N rows.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgekit.eval.glyphs.methods import Method
from edgekit.eval.stamps.model import prompt_ids
from edgekit.sources.picture_model import PictureModel
from edgekit.spin.torch_form import apply

__all__ = ["CONTRAST", "Answers", "answered"]

CONTRAST = 1.0  # the strength of VCD
NOISE, PLAUSIBLE = 2.0, 0.1
Asked = tuple[str, Path]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What was said, and what it cost.

    Attributes:
        texts: one per question.
        tokens: tokens of all answers, their ends among them.
        seconds: of the model's work, reading the prompts included.
        passes: steps of batches, each of which writes one token of every row.
    """

    texts: tuple[str, ...]
    tokens: int
    seconds: float
    passes: int


def answered(
    pictures: PictureModel,
    asked: Sequence[Asked],
    method: Method,
    *,
    limit: int,
    contrast: float | None = None,
    batch: int = 16,
) -> Answers:
    """Answers to questions about one picture each, greedily.

    Args:
        pictures: the model.
        asked: questions and pictures.
        method: SPIN's settings and what the heads are ranked by.
        limit: the most tokens of an answer.
        contrast: strength a of the contrast with a noised picture (VCD, arXiv 2311.16922): the next
            token is the argmax of (1 + a) l - a l' among those whose probability is at least a
            tenth of the likeliest's; two passes a token. None: no contrast.
        batch: rows at a time; only questions of as many tokens go together.
    """
    rows = [prompt_ids(pictures, question) for question, _ in asked]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    texts, tokens, seconds, passes = [""] * len(rows), 0, 0.0, 0
    for part in _batches([(number, len(rows[number])) for number in order], batch):
        ids = torch.tensor([rows[number] for number in part])
        seen = pictures.vision.seen([asked[number][1] for number in part])
        pixels = torch.from_numpy(seen.calls[0]["pixel_values"])
        with _turned_down(pictures.model, method):
            begun = time.perf_counter()
            found = _written(pictures, ids, pixels, limit, contrast, method.seed)
            seconds += time.perf_counter() - begun
        passes += max(map(len, found))
        tokens += sum(map(len, found))
        for number, row in zip(part, found, strict=True):
            texts[number] = pictures.tokenizer.decode(row)
    return Answers(texts=tuple(texts), tokens=tokens, seconds=seconds, passes=passes)


def _batches(lengths: Sequence[tuple[int, int]], most: int) -> Iterator[list[int]]:
    """Numbers of equally long rows, which stand together, at most so many at a time."""
    part: list[int] = []
    before = None
    for number, length in lengths:
        if part and (length != before or len(part) == most):
            yield part
            part = []
        part.append(number)
        before = length
    if part:
        yield part


@torch.no_grad()
def _written(
    pictures: PictureModel,
    ids: torch.Tensor,
    pixels: torch.Tensor,
    limit: int,
    contrast: float | None,
    seed: int,
) -> list[list[int]]:
    """Tokens after prompts `[N, T]`, each row's end among them."""
    model, device = pictures.model, pictures.model.device
    views = [pixels.to(device)]
    if contrast is not None:
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
        views.append((pixels + NOISE * noise).to(device))
    given = [{"input_ids": ids.to(device), "pixel_values": view} for view in views]
    end = model.generation_config.eos_token_id
    written = torch.zeros(len(ids), 0, dtype=torch.long, device=device)
    for _ in range(limit):
        found = [model(**arguments, use_cache=True, logits_to_keep=1) for arguments in given]
        logits = [one.logits[:, -1] for one in found]
        best = logits[0] if contrast is None else _contrast(logits[0], logits[1], contrast)
        chosen = best.argmax(dim=-1)
        written = torch.cat((written, chosen[:, None]), dim=1)
        if bool((written == end).any(dim=1).all()):
            break
        given = [
            {"input_ids": chosen[:, None], "past_key_values": one.past_key_values} for one in found
        ]
    return [_until_end(row, end) for row in written.tolist()]


def _contrast(plain: torch.Tensor, other: torch.Tensor, strength: float) -> torch.Tensor:
    floor = plain.amax(dim=-1, keepdim=True) + torch.tensor(PLAUSIBLE).log()
    contrast = (1 + strength) * plain - strength * other
    return contrast.masked_fill(plain < floor, -torch.inf)


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@contextlib.contextmanager
def _turned_down(model: Any, method: Method) -> Iterator[None]:
    if method.spin is None:
        yield
        return
    with apply(model, method.spin) as spin:
        if method.control == "inverted":
            spin.ranking = torch.neg
        if method.control == "random":
            random = torch.Generator().manual_seed(method.seed)
            spin.ranking = lambda scores: torch.rand(scores.shape, generator=random).to(scores)
        yield
