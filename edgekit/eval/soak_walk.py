"""One long text through one reading, checkpoint by checkpoint; a walk that was killed goes on.

Between two checkpoints lies a stretch, and every stretch is fed in the same calls, so that an
engine has seen every shape before the first checkpoint. There a walk leaves the logits, then the
state, then a line in its journal: what has a line is whole, and what has none is done again.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekit.errors import UsageError
from edgekit.eval.reader import Floats, Integers
from edgekit.eval.windows import Progress
from edgekit.journal import Journal, Record
from edgekit.runtime.memory import status_bytes

__all__ = ["JOURNAL", "Carried", "Route", "logits_at", "walk"]

JOURNAL = "journal.jsonl"
BLOCK = 512  # tokens of a call where a route is mixed
SINGLES = 128  # of a mixed stretch's last tokens, each with a call of its own


class Carried(Protocol):
    """A text in flight whose state can be kept in a file; `edgekit.runtime.Session` is one."""

    def append(self, ids: Integers) -> Floats:
        """Read `ids [T]`; returns the logits of the last position, `[1, V]`."""

    def save(self, path: Path) -> None:
        """Write the state."""

    def load(self, path: Path) -> object:
        """Go on from what `save` wrote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """How a text is fed.

    Attributes:
        tokens: of the whole walk; a multiple of `checkpoints`.
        checkpoints: evenly spaced, the last one at the end.
        block: tokens of a call; None: mixed, blocks of 512 and single tokens before a checkpoint.
    """

    tokens: int
    checkpoints: int
    block: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the option.
        """
        least = {"checkpoints": (2, self.checkpoints)}
        least |= {"block": (1, 1 if self.block is None else self.block)}
        for name, (bound, value) in least.items():
            if value < bound:
                raise UsageError(f"{name} {value} given; allowed: {bound} or more")
        if self.tokens < 1 or self.tokens % self.checkpoints:
            raise UsageError(
                f"tokens {self.tokens} given for {self.checkpoints} checkpoints; "
                "allowed: a multiple of that number"
            )

    @property
    def stretch(self) -> int:
        """Tokens from one checkpoint to the next."""
        return self.tokens // self.checkpoints

    @property
    def calls(self) -> tuple[tuple[int, int], ...]:
        """How a stretch is fed, in order: tokens of a call, and how many calls."""
        singles = min(SINGLES, self.stretch) if self.block is None else 0
        block = BLOCK if self.block is None else self.block
        whole, rest = divmod(self.stretch - singles, block)
        runs = ((block, whole), (rest, int(rest > 0)), (1, singles))
        return tuple((tokens, count) for tokens, count in runs if count)

    def spans(self, done: int) -> Iterator[tuple[int, int]]:
        """Where each call of the stretch after checkpoint number `done` begins and ends."""
        position = done * self.stretch
        for tokens, count in self.calls:
            for _ in range(count):
                yield position, position + tokens
                position += tokens


def walk(
    begin: Callable[[], Carried],
    ids: Integers,
    route: Route,
    folder: Path,
    settings: Mapping[str, Any],
    tell: Progress,
) -> list[Record]:
    """Read a text to its end, from the last checkpoint that an earlier run left.

    Args:
        begin: makes a reading at position 0; not called where nothing is left to read.
        ids: token ids `[T]`, T = `route.tokens`.
        route: checkpoints and calls.
        folder: what the walk leaves goes there.
        settings: JSON-ready; what the logits depend on beside the route.
        tell: called before each call with the folder's name, tokens read and tokens to read.

    Returns:
        Of each checkpoint: `tokens` read, the number of the `run` that read its stretch, the
        stretch's `seconds`, and `rss`, resident bytes of this process, None where `/proc` does not
        tell (not Linux).

    Raises:
        UsageError: if `folder` was begun with other settings, or cannot be written.
        BundleError: if the state that an earlier run left is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / JOURNAL, {**settings, "tokens": route.tokens, "calls": route.calls})
    if len(journal.records) == route.checkpoints:
        return journal.records
    reading, run = begin(), 0
    if journal.records:
        reading.load(folder / _state_name(journal.records[-1]["tokens"]))
        run = journal.records[-1]["run"] + 1
    for done in range(len(journal.records), route.checkpoints):
        began = time.perf_counter()
        logits = np.zeros((1, 0), dtype=np.float32)
        for start, end in route.spans(done):
            tell(folder.name, start, route.tokens)
            logits = reading.append(ids[start:end])
        seconds = round(time.perf_counter() - began, 3)
        tokens = (done + 1) * route.stretch
        _leave(folder, tokens, reading, logits[0])
        journal.append(
            {"tokens": tokens, "run": run, "seconds": seconds, "rss": status_bytes("VmRSS")}
        )
        _forget_states(folder, but=tokens)
    return journal.records


def logits_at(folder: Path, tokens: int) -> Floats:
    """The logits `[V]` that a walk left in `folder` after `tokens` tokens."""
    found: Floats = np.load(folder / _logits_name(tokens))
    return found


def _leave(folder: Path, tokens: int, reading: Carried, logits: Floats) -> None:
    part = folder / ".part"
    with part.open("wb") as file:
        np.save(file, logits)
    os.replace(part, folder / _logits_name(tokens))
    reading.save(part)
    os.replace(part, folder / _state_name(tokens))


def _forget_states(folder: Path, but: int) -> None:
    for path in folder.glob("state-*"):
        if path.name != _state_name(but):
            path.unlink()


def _logits_name(tokens: int) -> str:
    return f"logits-{tokens:09}.npy"


def _state_name(tokens: int) -> str:
    return f"state-{tokens:09}.safetensors"
