"""A vocabulary of objects, and the objects that a text names.

One line per object: its name, then whatever else means it, with commas between. Terms may have
several words; the longest that fits counts. Plurals of regular nouns are understood, others are
given as terms:

    mouse, mice
    dining table, table
    dog, puppy
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import UsageError
from edgekit.utf8 import read_text

__all__ = ["Vocabulary", "read_vocabulary"]

WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
Term = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What objects are called.

    Attributes:
        objects: by term, a tuple of lower-case words.
    """

    objects: Mapping[Term, str]

    @property
    def names(self) -> list[str]:
        """All objects, each once, in order."""
        return list(dict.fromkeys(self.objects.values()))

    def mentions(self, text: str) -> list[str]:
        """The objects that a text names, in order, each as often as it does."""
        words = [word.lower() for word in WORD.findall(text)]
        reach = max(map(len, self.objects))
        found, at = [], 0
        while at < len(words):
            size, name = self._longest(words[at : at + reach])
            found += [] if name is None else [name]
            at += size
        return found

    def _longest(self, words: list[str]) -> tuple[int, str | None]:
        """How many of the first words are one term, and its object; one word that is none."""
        for size in range(len(words), 0, -1):
            for last in _singulars(words[size - 1]):
                name = self.objects.get((*words[: size - 1], last))
                if name is not None:
                    return size, name
        return 1, None


def _singulars(word: str) -> Iterator[str]:
    """The word, and what it may be the plural of."""
    yield word
    if word.endswith("ies"):
        yield f"{word[:-3]}y"
    if word.endswith("ves"):
        yield f"{word[:-3]}f"
        yield f"{word[:-3]}fe"
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("s"):
        yield word[:-1]


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a text file; empty lines and those that begin with `#` are left out.

    Raises:
        UsageError: if it cannot be read, names nothing, or gives one term to two objects.
    """
    objects: dict[Term, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        terms = [] if line.startswith("#") else [part.strip() for part in line.split(",")]
        for term in filter(None, terms):
            words = tuple(word.lower() for word in WORD.findall(term))
            if not words:
                raise UsageError(f"{path}, line {number}: {term!r} has no word in it")
            name = objects.setdefault(words, terms[0])
            if name != terms[0]:
                raise UsageError(
                    f"{path}, line {number}: {term!r} means {name!r} and {terms[0]!r}; "
                    "give each term to one object"
                )
    if not objects:
        raise UsageError(f"{path}: no object in it; give one per line, such as 'mouse, mice'")
    return Vocabulary(objects)
