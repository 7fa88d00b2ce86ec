"""Scored samples summed up by length and by depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.wilson import wilson

__all__ = ["Cell", "DepthCell", "summed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthCell:
    """Samples of one length and depth."""

    depth: float
    samples: int
    correct: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Samples of one length.

    Attributes:
        accuracy: share that is right; None where the model cannot read the length.
        interval: Wilson's, 95 %.
        depths: the same samples by depth.
        laps: haystacks that the longest text is made of; above 1, its sentences come again.
        seconds: of reading and answering, all samples together.
        refused: why the model cannot read the length; None where it can.
    """

    length: int
    samples: int = 0
    correct: int = 0
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    depths: tuple[DepthCell, ...] = ()
    laps: int = 0
    seconds: float = 0.0
    refused: str | None = None


def summed(length: int, records: Sequence[dict[str, Any]]) -> Cell:
    """The cell of `length` from its samples' records, at least one."""
    correct = sum(record["correct"] for record in records)
    depths = sorted({record["depth"] for record in records})
    return Cell(
        length=length,
        samples=len(records),
        correct=correct,
        accuracy=correct / len(records),
        interval=wilson(correct, len(records)),
        depths=tuple(_at_depth(depth, records) for depth in depths),
        laps=max(record["laps"] for record in records),
        seconds=sum(record["seconds"] for record in records),
    )


def _at_depth(depth: float, records: Sequence[dict[str, Any]]) -> DepthCell:
    there = [record["correct"] for record in records if record["depth"] == depth]
    return DepthCell(depth=depth, samples=len(there), correct=sum(there))
