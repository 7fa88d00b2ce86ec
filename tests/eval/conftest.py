"""Tiny bundles, and a model that is known to find every needle."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekit.eval.reader import Floats, Integers, Reader, open_reader
from edgekit.export.pipeline import convert
from edgekit.runtime.text import Tokenizer

KINDS = {
    "softmax": {},
    "lawcat": {"mixer": "lawcat"},
    "hybrid": {"mixer": "lawcat", "softmax_layers": (1,)},
}
VALUES = (
    re.compile(r"The pass key is (\d+)\."),
    re.compile(r"One of the special magic \w+ for [\w-]+ is: ([\w-]+)\."),
)


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`bundles("hybrid")` is a directory with both engines, made once; read-only."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("eval") / kind
            convert(checkpoint, made[kind], weights="fp32", verify=False, **KINDS[kind])
        return made[kind]

    return make


class FinderReading:
    """Answers with the value that it finds in the text, or from a start with what `say` makes."""

    def __init__(self, tokenizer: Tokenizer, batch: int, say: Callable[[str], str]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._answers: list[list[int]] = [[] for _ in range(batch)]
        self._begun = False

    def append(self, ids: Integers, mask: Integers | None = None) -> Floats:
        if not self._begun:
            keep = np.ones_like(ids) if mask is None else mask
            self._answers = [self._answer(row[on == 1]) for row, on in zip(ids, keep, strict=True)]
        self._begun = True
        logits = np.zeros((len(ids), self._tokenizer.vocab_size), dtype=np.float32)
        for row, answer in enumerate(self._answers):
            logits[row, answer.pop(0) if answer else 2] = 1.0
        return logits

    def _answer(self, ids: Integers) -> list[int]:
        text = self._tokenizer.decode(ids)
        found = next(match for value in VALUES if (match := value.search(text)))
        return self._tokenizer.encode(self._say(f" {found.group(1)}")).tolist()


@pytest.fixture
def finder(checkpoint: Path) -> Callable[..., Reader]:
    """`finder(say=...)` reads every needle's value and says what `say` makes of it."""
    template = open_reader(checkpoint, logits="last")

    def make(say: Callable[[str], str] = str, limit: int | None = None) -> Reader:
        return replace(
            template,
            limit=limit,
            start=lambda batch: FinderReading(template.tokenizer, batch, say),
        )

    return make
