"""Scenes out of stamps: what is drawn, what a caption says of it, and the picture.

A scene has a theme, whose objects are likelier than all others. In a scene to learn from, some of
what the caption mentions is not drawn, so that a model learns to say what usually goes together.
A picture is 3 x 3 cells of 32 pixels; each object stands in a cell of its own, or a little beyond.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekit.data.odds import Odds
from edgekit.errors import UsageError

__all__ = [
    "BOOK",
    "FOLDER",
    "LIKELY",
    "SIDE",
    "SURPRISING",
    "Odds",
    "Scene",
    "StampBook",
    "article",
    "caption",
    "compose",
    "draw_scene",
]

BOOK, FOLDER = "stamps.json", "stamps"
CELLS, CELL = 3, 32
SIDE = CELLS * CELL
SIZES = (24, 36)  # of a stamp's longer side, in pixels
JITTER = 4  # pixels from the middle of a cell
NOISE = 10.0  # the most, of 255
MOST = 6  # objects of a scene
Themes = Mapping[str, Sequence[str]]


LIKELY = Odds(theme=0.5, other=0.02, undrawn=0.4)  # what a model learns from
SURPRISING = Odds(theme=0.25, other=0.06, undrawn=0.0)  # what it is tested on


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects that the caption mentions, and those of them that are drawn."""

    mentioned: tuple[str, ...]
    drawn: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StampBook:
    """The stamps that `edgekit.data.stamps` made.

    Attributes:
        themes: objects by theme.
        stamps: RGBA pictures of each object.
    """

    themes: Mapping[str, tuple[str, ...]]
    stamps: Mapping[str, tuple[Image.Image, ...]]

    @classmethod
    def read(cls, folder: Path) -> "StampBook":
        """Open the stamps of a directory.

        Raises:
            UsageError: if they are not there.
        """
        try:
            listed = json.loads((folder / BOOK).read_text(encoding="utf-8"))
            stamps = {
                name: tuple(_opened(folder / FOLDER / file) for file in files)
                for objects in listed.values()
                for name, files in objects.items()
            }
        except (OSError, ValueError, AttributeError) as cause:
            raise UsageError(
                f"{folder}: its {BOOK} and stamps cannot be read ({cause}); "
                "make them with python -m edgekit.data.stamps"
            ) from cause
        return cls({theme: tuple(objects) for theme, objects in listed.items()}, stamps)

    @property
    def names(self) -> tuple[str, ...]:
        """All objects, theme by theme."""
        return tuple(name for objects in self.themes.values() for name in objects)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGBA")


def draw_scene(rng: np.random.Generator, themes: Themes, odds: Odds) -> Scene:
    """A scene of one theme; at least one object, at most six."""
    theme = list(themes)[int(rng.integers(len(themes)))]
    names = [name for objects in themes.values() for name in objects]
    chances = [odds.theme if name in themes[theme] else odds.other for name in names]
    there = np.flatnonzero(rng.random(len(names)) < chances)
    if there.size > MOST:
        there = np.sort(rng.choice(there, MOST, replace=False))
    mentioned = tuple(names[i] for i in there) or (str(rng.choice(themes[theme])),)
    seen = rng.random(len(mentioned)) >= odds.undrawn
    return Scene(mentioned, tuple(n for n, drawn in zip(mentioned, seen, strict=True) if drawn))


def article(name: str) -> str:
    """`a` or `an`."""
    return "an" if name[:1].lower() in "aeiou" else "a"


def caption(objects: Sequence[str], themes: Themes) -> str:
    """A sentence such as "There is a dog, a lion and an apple.", of one object or more.

    First come the objects of the theme that most are of, so that its beginning tells what is likely
    to follow.
    """
    major = max(themes, key=lambda theme: sum(name in themes[theme] for name in objects))
    ordered = sorted(objects, key=lambda name: name not in themes[major])
    listed = [f"{article(name)} {name}" for name in ordered]
    return f"There is {' and '.join(filter(None, (', '.join(listed[:-1]), listed[-1])))}."


def compose(rng: np.random.Generator, book: StampBook, drawn: Sequence[str]) -> Image.Image:
    """An RGB picture, `SIDE` pixels wide and high, of some objects on a plain or shaded ground.

    Args:
        rng: chooses places, sizes and colours.
        book: has a stamp of each object.
        drawn: objects, at most nine.
    """
    picture = _ground(rng)
    cells = rng.permutation(CELLS * CELLS)
    for name, cell in zip(drawn, cells, strict=False):
        stamp = _varied(rng, book.stamps[name])
        middle = CELL * np.array([cell % CELLS, cell // CELLS]) + CELL // 2
        corner = middle + rng.integers(-JITTER, JITTER + 1, 2) - np.array(stamp.size) // 2
        most = SIDE - np.array(stamp.size)
        left, top = (int(n) for n in np.clip(corner, 0, most))
        picture.paste(stamp, (left, top), stamp)
    return picture


def _ground(rng: np.random.Generator) -> Image.Image:
    """One colour, or four that run into each other; and some noise."""
    corners = rng.integers(60, 256, (2, 2, 3)).astype(np.uint8)
    if rng.random() < 0.5:
        corners[:] = corners[0, 0]
    smooth = Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    noise = rng.uniform(0, NOISE) * rng.standard_normal((SIDE, SIDE, 3))
    values: npt.NDArray[np.float64] = np.asarray(smooth) + noise
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _varied(rng: np.random.Generator, stamps: Sequence[Image.Image]) -> Image.Image:
    """One of an object's stamps, in a size of its own, mirrored or not."""
    stamp = stamps[int(rng.integers(len(stamps)))]
    scale = int(rng.integers(SIZES[0], SIZES[1] + 1)) / max(stamp.size)
    width, height = (max(round(n * scale), 1) for n in stamp.size)
    stamp = stamp.resize((width, height), Image.Resampling.BICUBIC)
    mirrored = rng.random() < 0.5
    return stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else stamp
