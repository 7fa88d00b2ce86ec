"""Questions made from hand-written templates: topics that a small model would not ask about."""

import functools
import importlib.resources
import re
from collections.abc import Mapping

import numpy as np

__all__ = ["template_question"]

PLACE = re.compile(r"\{(\w+)\}")
LARGEST_NUMBER = 100
BRIEF_SHARE = 0.3


def template_question(random: np.random.Generator) -> str:
    """A question out of `questions.txt`, its places filled at random, some asking for brevity."""
    sections = _sections()
    template = _choice(sections["templates"], random)
    question = PLACE.sub(lambda place: _fill(place[1], sections, random), template)
    brief = random.random() < BRIEF_SHARE
    return f"{question} {_choice(sections['brief'], random)}" if brief else question


def _fill(name: str, sections: Mapping[str, tuple[str, ...]], random: np.random.Generator) -> str:
    if name == "number":
        return str(random.integers(2, LARGEST_NUMBER))
    return _choice(sections[name], random)


def _choice(lines: tuple[str, ...], random: np.random.Generator) -> str:
    return lines[int(random.integers(len(lines)))]


@functools.cache
def _sections() -> Mapping[str, tuple[str, ...]]:
    text = importlib.resources.files("edgekit.data").joinpath("questions.txt").read_text("utf-8")
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return {name: tuple(lines) for name, lines in sections.items()}
