"""Pictures in prompts: placeholders become image tokens, pictures the embeddings behind them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgekit.bundle import VisionFacts
from edgekit.errors import UsageError
from edgekit.runtime.engine import Array, Floats, Integers
from edgekit.runtime.images import ImageProcessor, Picture, read_image
from edgekit.runtime.images_qwen import PatchGrid, PatchProcessor
from edgekit.runtime.images_tiles import TileProcessor
from edgekit.runtime.pictures import Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Eye", "PatchEye", "Seen", "TileEye", "Vision", "WholeEye", "open_eye"]

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages], str]
PIXELS = "pixel_values"


@dataclass(frozen=True, slots=True)
class Seen:
    """Pixels as the graphs of pictures take them, before these run.

    Attributes:
        calls: inputs of each call of the graphs, pixels first.
        grids: how each picture is laid out, int64 `[pictures, 3]`, as its eye counts it: see
            `Pictures`, or `TileProcessor`; of pictures of one size, nothing.
    """

    calls: tuple[dict[str, Array], ...]
    grids: Integers


class Eye(Protocol):
    """From pictures to what the graphs of pictures take."""

    def __call__(self, images: "Sequence[Image]") -> Seen:
        """Pixels of RGB pictures.

        Raises:
            UsageError: for pictures that the model cannot take.
        """

    def texts(self, grids: Integers) -> list[str]:
        """What stands for each picture in a prompt, image tokens among it.

        Args:
            grids: of `Seen`, a row for each picture.
        """


@dataclass(frozen=True, slots=True)
class WholeEye:
    """Pictures of one size, all in one call."""

    processor: ImageProcessor
    facts: VisionFacts

    def __call__(self, images: "Sequence[Image]") -> Seen:
        """See `Eye`."""
        return Seen(({PIXELS: self.processor(images)},), _one_size(len(images)))

    def texts(self, grids: Integers) -> list[str]:
        """See `Eye`."""
        return [_image_text(self.facts, self.facts.tokens)] * len(grids)


@dataclass(frozen=True, slots=True)
class TileEye:
    """Pictures of any size as squares of one size, those of all pictures in one call."""

    processor: TileProcessor
    facts: VisionFacts

    def __call__(self, images: "Sequence[Image]") -> Seen:
        """See `Eye`."""
        squares, grids = self.processor(images)
        return Seen(({PIXELS: squares},), grids)

    def texts(self, grids: Integers) -> list[str]:
        """See `Eye`."""
        small = _image_text(self.facts, self.facts.tokens)
        return [self._tiles(*grid[1:]) + small for grid in grids.tolist()]

    def _tiles(self, rows: int, columns: int) -> str:
        texts, tokens = self.facts.tiles, self.facts.tokens
        assert texts is not None
        assert tokens is not None
        if not rows:
            return ""
        tile = texts.before + self.facts.image_token * tokens
        lines = [
            "".join(_numbered(tile, row, column) for column in range(1, columns + 1))
            for row in range(1, rows + 1)
        ]
        return texts.row_end.join((*lines, texts.end))


@dataclass(frozen=True, slots=True)
class PatchEye:
    """Pictures of any size in patches, each in a call of its own."""

    processor: PatchProcessor
    grid: PatchGrid
    facts: VisionFacts

    def __call__(self, images: "Sequence[Image]") -> Seen:
        """See `Eye`."""
        patches, grids = self.processor(images)
        ends = np.cumsum(grids.prod(axis=1))[:-1]
        parts = zip(np.split(patches, ends), grids, strict=True)
        calls = tuple({PIXELS: part, **self.grid.inputs(grid)} for part, grid in parts)
        return Seen(calls, grids)

    def texts(self, grids: Integers) -> list[str]:
        """See `Eye`."""
        tokens: list[int] = (grids.prod(axis=1) // self.grid.merge**2).tolist()
        return [_image_text(self.facts, count) for count in tokens]


def open_eye(directory: Path, facts: VisionFacts) -> Eye:
    """What a bundle says of its pictures.

    Raises:
        BundleError: if its processor is missing or damaged, or asks for steps that are not known.
    """
    if facts.tiles is not None:
        return TileEye(TileProcessor.read(directory), facts)
    if facts.tokens is not None:
        return WholeEye(ImageProcessor.read(directory), facts)
    return PatchEye(PatchProcessor.read(directory), PatchGrid.read(directory), facts)


class Vision:
    """What a model needs beside its decoder to read pictures."""

    def __init__(
        self, eye: Eye, facts: VisionFacts, look: Callable[[Mapping[str, Array]], Floats]
    ) -> None:
        """Put the parts together.

        Args:
            eye: from pictures to pixels.
            facts: how pictures come into prompts.
            look: from pixels to embeddings, the engine's graphs.
        """
        self._eye, self._facts, self._look = eye, facts, look

    def seen(self, pictures: Sequence[Picture]) -> Seen:
        """Pixels of pictures.

        Raises:
            UsageError: for a picture that cannot be read.
            EngineError: if Pillow is not installed.
        """
        return self._eye([read_image(picture) for picture in pictures])

    def look(self, seen: Seen) -> Pictures:
        """What the decoder reads of them."""
        found = [self._look(call) for call in seen.calls]
        features = np.concatenate([part.reshape(-1, part.shape[-1]) for part in found])
        return Pictures(features, seen.grids)

    def prompt(self, text: str, grids: Integers) -> str:
        """The prompt with what the eye says in place of its placeholders.

        Args:
            text: with one placeholder per picture, or with none: then they come first.
            grids: of `Seen`, a row for each picture.

        Raises:
            UsageError: if the placeholders are not as many as the pictures.
        """
        facts, count = self._facts, len(grids)
        given = text.count(facts.placeholder)
        if given not in (0, count):
            raise UsageError(
                f"{given} placeholders {facts.placeholder!r} given for {count} pictures; "
                "allowed: as many, or none"
            )
        if not given:
            text = facts.inserted * count + text
        pieces = text.split(facts.placeholder)
        for number, image in enumerate(self._eye.texts(grids), 1):
            pieces[number] = image + pieces[number]
        return "".join(pieces)

    def chat_prompt(self, render: Render, messages: Messages, pictures: int) -> str:
        """A conversation as a prompt, with placeholders in its first message of the user.

        Some templates take a message as a list of parts and write the placeholder themselves, some
        take it as a text alone; which it is shows in what they write.

        Args:
            render: applies the model's chat template.
            messages: `{"role": ..., "content": ...}` each, contents as text.
            pictures: how many there are.

        Raises:
            UsageError: if the template refuses the messages either way.
        """
        first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), 0)
        listed, plain = [], []
        for i, message in enumerate(messages):
            here, text = pictures if i == first else 0, message.get("content", "")
            parts = [*[{"type": "image"}] * here, {"type": "text", "text": text}]
            listed.append({**message, "content": parts})
            plain.append({**message, "content": self._facts.inserted * here + text})
        try:
            prompt = render(listed)
        except UsageError:
            return render(plain)
        said = all(str(message.get("content", "")).strip() in prompt for message in messages)
        whole = said and prompt.count(self._facts.placeholder) == pictures
        return prompt if whole else render(plain)


def _image_text(facts: VisionFacts, tokens: int | None) -> str:
    """Image tokens between their markers."""
    assert tokens is not None
    return facts.before + facts.image_token * tokens + facts.after


def _numbered(text: str, row: int, column: int) -> str:
    return text.replace("{row}", str(row)).replace("{column}", str(column))


def _one_size(count: int) -> Integers:
    """Grids of pictures that have none: a row for each, of nothing."""
    return np.zeros((count, 3), dtype=np.int64)
