"""Scenes, pictures and captions of the glyph world.

Object o is of theme o // 4. A picture is 4 x 4 cells of 10 pixels; an object adds its glyph, 8 x 8
pixels in its colour, to a cell of its own. A caption is `BOS WITH o1 AND o2 ... EOS`, first the
objects of the theme that most are of, so that its beginning tells what is likely to follow.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.data.odds import Odds

__all__ = [
    "AND",
    "BOS",
    "CAPTION",
    "EOS",
    "IMAGE",
    "LIKELY",
    "OBJECTS",
    "PATCHES",
    "SIDE",
    "SURPRISING",
    "VOCABULARY",
    "WITH",
    "Odds",
    "Scene",
    "caption",
    "draw_scene",
    "picture",
]

THEMES, PER_THEME = 4, 4
OBJECTS = THEMES * PER_THEME
BOS, EOS, AND, WITH, IMAGE = range(OBJECTS, OBJECTS + 5)
VOCABULARY = OBJECTS + 5
CELLS, CELL, MARGIN = 4, 10, 1
SIDE, PATCHES = CELLS * CELL, CELLS * CELLS
MOST = 8  # objects of a scene
CAPTION = 2 + MOST + (MOST - 1) + 1  # tokens
NOISE, CONTRAST, GLYPH_SEED = 0.15, 2.0, 123
Floats = npt.NDArray[np.float32]


LIKELY = Odds(theme=0.75, other=0.04, undrawn=0.4)  # what a model learns from
SURPRISING = Odds(theme=0.5, other=0.1, undrawn=0.0)  # what it is tested on


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects that the caption mentions, and those of them that are drawn."""

    mentioned: tuple[int, ...]
    drawn: tuple[int, ...]


def draw_scene(rng: np.random.Generator, odds: Odds) -> Scene:
    """A scene of one theme; at least one object, at most eight."""
    theme = int(rng.integers(THEMES))
    chances = np.full(OBJECTS, odds.other)
    chances[theme * PER_THEME : (theme + 1) * PER_THEME] = odds.theme
    there = np.flatnonzero(rng.random(OBJECTS) < chances)[:MOST]
    if not there.size:
        there = np.array([theme * PER_THEME + int(rng.integers(PER_THEME))])
    drawn = there[rng.random(there.size) >= odds.undrawn]
    return Scene(tuple(there.tolist()), tuple(drawn.tolist()))


def caption(objects: Sequence[int]) -> list[int]:
    """Tokens of the caption of some objects, padded with EOS to `CAPTION`."""
    counts = np.bincount([o // PER_THEME for o in objects], minlength=THEMES)
    major = int(counts.argmax())
    ordered = sorted(objects, key=lambda o: (o // PER_THEME != major, o))
    listed = [token for o in ordered for token in (AND, o)][1:]
    tokens = [BOS, WITH, *listed]
    return tokens + [EOS] * (CAPTION - len(tokens))


def picture(rng: np.random.Generator, drawn: Sequence[int]) -> Floats:
    """Pixels `[3, SIDE, SIDE]` of some objects, each in a cell of its own, and noise."""
    glyphs, colours = _looks()
    pixels = NOISE * rng.standard_normal((3, SIDE, SIDE))
    for o, cell in zip(drawn, rng.permutation(CELLS * CELLS), strict=False):
        top, left = (CELL * n + MARGIN for n in divmod(int(cell), CELLS))
        size = glyphs.shape[1]
        pixels[:, top : top + size, left : left + size] += (
            CONTRAST * colours[o][:, None, None] * glyphs[o]
        )
    return pixels.astype(np.float32)


@functools.cache
def _looks() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Glyphs `[OBJECTS, 8, 8]` of 0 and 1, and colours `[OBJECTS, 3]`, the same for everyone."""
    rng = np.random.default_rng(GLYPH_SEED)
    size = CELL - 2 * MARGIN
    glyphs = (rng.random((OBJECTS, size, size)) < 0.5).astype(np.float64)
    return glyphs, 0.3 + 0.7 * rng.random((OBJECTS, 3))
