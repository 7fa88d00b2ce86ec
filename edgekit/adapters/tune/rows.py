"""Examples as rows of tokens: one each, none cut, a batch as wide as its longest row."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgekit.adapters.tune.recipe import Recipe
from edgekit.data.batch import IGNORE
from edgekit.data.documents import Document, read_documents, times_given
from edgekit.data.packing import Row, as_row, stacked
from edgekit.data.tokens import tokenise
from edgekit.errors import UsageError
from edgekit.runtime.text import Tokenizer

__all__ = ["Examples", "Rows", "read_rows"]

HELD_BACK = 10  # one of so many examples, where a search needs some and no file is given
ENDING, DATASETS = ".jsonl", "datasets:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows to train on or to measure with.

    Attributes:
        rows: ids and targets of each.
        files: where they come from: name, sha256, rows, dropped, times.
        pad: the id that fills a batch.
    """

    rows: tuple[Row, ...]
    files: tuple[dict[str, Any], ...]
    pad: int

    def __len__(self) -> int:
        """How many there are."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """One of them."""
        return self.rows[index]

    @property
    def labels(self) -> int:
        """Tokens to predict in all of them."""
        return sum(int((targets != IGNORE).sum()) for _, targets in self.rows)

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Arguments of `Tuned.forward`: as wide as the longest row."""
        found = stacked(rows, length=max(len(ids) for ids, _ in rows), pad=self.pad)
        tensors = {"ids": torch.from_numpy(found.ids), "labels": torch.from_numpy(found.targets)}
        if found.mask is not None:
            tensors["mask"] = torch.from_numpy(found.mask).long()
        return tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Rows to train on, and rows that are held out; None: none are."""

    train: Rows
    held_out: Rows | None


def read_rows(
    data: Sequence[str | Path],
    held_out: Path | None,
    plan: Recipe,
    tokenizer: Tokenizer,
    *,
    eos: int,
    hold_back: bool = False,
) -> Examples:
    """Read and tokenise the examples.

    Args:
        data: `.jsonl` files or `datasets:ID[:SPLIT]`, with `@N` at the end to count N times.
        held_out: such a file to measure with.
        plan: the recipe.
        tokenizer: of the model.
        eos: the id that ends a text or completion.
        hold_back: measure with a tenth of `data` where `held_out` is None.

    Raises:
        UsageError: naming file and line of what is malformed, too long, or has nothing to learn.
    """
    if not data:
        raise UsageError("no data given; give --data FILE.jsonl")
    reader = _Reader(plan, tokenizer, eos)
    train, back = reader.rows(times_given(data), hold_back and held_out is None)
    if held_out is not None:
        back, _ = reader.rows({str(held_out): 1}, False)
    if not train.rows or (back is not None and not back.rows):
        raise UsageError("no examples are left to train on or to measure with; give more data")
    return Examples(train=train, held_out=back)


class _Part:
    """Rows of several files, as they come."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._files: list[dict[str, Any]] = []

    def add(self, file: dict[str, Any], rows: Sequence[Row | None], times: int) -> None:
        """Take the rows of a file; None stands for one that was left out."""
        found = [row for row in rows if row is not None]
        counts = {"rows": len(found), "dropped": len(rows) - len(found), "times": times}
        self._files.append(file | counts)
        self._rows += found * times

    def rows(self, pad: int) -> Rows:
        """All of them."""
        return Rows(rows=tuple(self._rows), files=tuple(self._files), pad=pad)


class _Reader:
    def __init__(self, plan: Recipe, tokenizer: Tokenizer, eos: int) -> None:
        self._plan, self._tokenizer, self._eos = plan, tokenizer, eos

    def rows(self, files: dict[str, int], split: bool) -> tuple[Rows, Rows | None]:
        """All rows, or those that are not held back and those that are."""
        kept, back = _Part(), _Part()
        for name, times in files.items():
            if not (name.startswith(DATASETS) or name.endswith(ENDING)):
                raise UsageError(f"{name} given; allowed: {ENDING} files or {DATASETS}ID[:SPLIT]")
            origin = read_documents(name)
            rows = [self._row(document) for document in origin.documents]
            behind = [split and _held_back(origin.sha256, i) for i in range(len(rows))]
            file = {"name": origin.name, "sha256": origin.sha256}
            for part, wanted, count in ((kept, False, times), (back, True, 1)):
                chosen = [row for row, b in zip(rows, behind, strict=True) if b == wanted]
                part.add(file, chosen, count)
        return kept.rows(self._eos), back.rows(self._eos) if split else None

    def _row(self, document: Document) -> Row | None:
        """The row of one document; None: it is left out, being too long."""
        plan = self._plan
        tokens = tokenise(document, self._tokenizer, eos=self._eos, chat_loss=plan.chat_loss)
        if len(tokens.ids) > plan.length:
            if plan.long_rows == "drop":
                return None
            raise UsageError(
                f"{document.where}: {len(tokens.ids)} tokens, length {plan.length}; nothing is "
                "cut: give --set length=N, or --set long_rows=drop to leave such rows out"
            )
        if not tokens.learn.any():
            raise UsageError(f"{document.where}: nothing to predict in it; leave it out")
        return as_row(tokens)


def _held_back(sha256: str, number: int) -> bool:
    digest = hashlib.sha256(f"{sha256} {number}".encode()).hexdigest()
    return int(digest, 16) % HELD_BACK == 0
