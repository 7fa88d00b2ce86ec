"""Pictures and what is in them: the annotations that CHAIR and POPE are measured against.

JSON Lines, one picture each; paths are relative to the file:

    {"image": "a.png", "objects": ["dog", "tree"]}

or one question each, in POPE's own form:

    {"image": "a.png", "text": "Is there a dog in the image?", "label": "yes"}
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgekit.errors import UsageError
from edgekit.utf8 import read_text

__all__ = ["SPLITS", "Annotated", "Question", "Split", "read_pictures", "read_questions", "split"]

Split = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Split, ...] = get_args(Split)
QUESTION = "Is there {article} {name} in the image?"
ANSWERS = {"yes": True, "no": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotated:
    """A picture and all objects in it."""

    image: Path
    objects: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A yes-or-no question about a picture.

    Attributes:
        there: whether yes is right.
    """

    image: Path
    text: str
    there: bool


def read_pictures(path: Path) -> list[Annotated]:
    """Pictures with their objects.

    Raises:
        UsageError: naming the line that cannot be read, or a picture that is not there.
    """
    return [
        Annotated(image=image, objects=tuple(_strings(line, "objects", where)))
        for where, image, line in _lines(path)
    ]


def read_questions(path: Path) -> list[Question]:
    """Questions in POPE's form; errors as `read_pictures`."""
    found = []
    for where, image, line in _lines(path):
        label, text = line.get("label"), line.get("text")
        if label not in ANSWERS or not isinstance(text, str):
            raise UsageError(f"{where}: needs a text, and a label that is yes or no")
        found.append(Question(image=image, text=text, there=ANSWERS[label]))
    return found


def _lines(path: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Where a line stands, its picture, and all that it holds."""
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"{path}: no picture in it; give one per line")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except ValueError as cause:
            raise UsageError(f"{where}: no JSON ({cause})") from cause
        if not isinstance(found, dict) or not isinstance(found.get("image"), str):
            raise UsageError(f'{where}: needs an "image", the file of a picture')
        image = path.parent / found["image"]
        if not image.is_file():
            raise UsageError(f"{where}: {image}: no such picture")
        yield where, image, found


def _strings(line: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = line.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UsageError(f'{where}: needs "{key}", a list of names')
    return values


def split(
    pictures: Sequence[Annotated], kind: Split, *, each: int = 6, seed: int = 0
) -> list[Question]:
    """Questions as POPE asks them (arXiv 2305.10355): for each picture as many yeses as noes.

    The objects that are not there are drawn at random, or are those that most pictures have
    (`popular`), or those that stand most often together with what is there (`adversarial`).

    Args:
        pictures: annotated; those with no object, or with all of them, get no question.
        kind: of `SPLITS`.
        each: questions of a picture, an even number; fewer where a picture has fewer objects.
        seed: of what is drawn.

    Raises:
        UsageError: for an odd `each`, or if no picture has both kinds of object.
    """
    if each < 2 or each % 2:
        raise UsageError(f"{each} questions for each picture given; allowed: an even number")
    rng = random.Random(seed)
    counts = Counter(name for picture in pictures for name in set(picture.objects))
    names = sorted(counts)
    asked: list[Question] = []
    for picture in pictures:
        there = sorted(set(picture.objects))
        absent = [name for name in names if name not in there]
        rng.shuffle(absent)
        if kind == "popular":
            absent.sort(key=lambda name: -counts[name])
        if kind == "adversarial":
            together = _together(pictures, there)
            absent.sort(key=lambda name: -together[name])
        number = min(each // 2, len(there), len(absent))
        chosen = [(name, True) for name in rng.sample(there, number)]
        chosen += [(name, False) for name in absent[:number]]
        asked += [
            Question(image=picture.image, text=_question(name), there=yes) for name, yes in chosen
        ]
    if not asked:
        raise UsageError("every picture has none or all of the objects; nothing can be asked")
    return asked


def _together(pictures: Sequence[Annotated], there: Sequence[str]) -> Counter[str]:
    """How often each object is in a picture with one of `there`, for every such pair."""
    found: Counter[str] = Counter()
    for picture in pictures:
        shared = len(set(there) & set(picture.objects))
        for name in set(picture.objects):
            found[name] += shared
    return found


def _question(name: str) -> str:
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return QUESTION.format(article=article, name=name)
