"""What a soak found: memory and error at each checkpoint, and whether they stay where they were."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.eval.machine import Machine
from edgekit.eval.reader import Floats
from edgekit.eval.soak_parallel import Parallel
from edgekit.eval.soak_walk import logits_at
from edgekit.journal import Record
from edgekit.markdown import markdown_table

__all__ = ["ALLOWED_ERROR", "ALLOWED_GROWTH", "Checkpoint", "Soak", "as_text", "compared"]

ALLOWED_GROWTH = 0.02  # of resident memory, from a run's first checkpoint on
ALLOWED_ERROR = 1e-3  # of fp32 logits; rounded weights are multiplied otherwise in blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One place of the walk.

    Attributes:
        tokens: read so far.
        run: 0, and one more after each interruption; a new process has memory of its own.
        seconds: of the stretch that ends here.
        rss: resident bytes of the process; None where the system does not tell.
        error: RMS(logits - reference) / RMS(reference).
    """

    tokens: int
    run: int
    seconds: float
    rss: int | None
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Soak:
    """The result.

    Attributes:
        weights: format of the bundle's weights.
        calls: how every stretch was fed, as (tokens of a call, calls).
        reference: what the logits are compared with, in words.
        allowed_error: None: the error is said and not judged.
        text: where the tokens come from.
    """

    command: str
    bundle: str
    engine: str
    weights: str
    threads: int | None
    text: str
    calls: tuple[tuple[int, int], ...]
    reference: str
    allowed_error: float | None
    checkpoints: tuple[Checkpoint, ...]
    parallel: Parallel
    machine: Machine

    @property
    def growth(self) -> float | None:
        """Largest share by which memory exceeds what it was at the first checkpoint of its run.

        None where it is not known, or no run has two checkpoints.
        """
        shares = []
        for _, run in itertools.groupby(self.checkpoints, key=lambda checkpoint: checkpoint.run):
            sizes = [checkpoint.rss for checkpoint in run if checkpoint.rss is not None]
            shares += [size / sizes[0] - 1 for size in sizes[1:]]
        return max(shares, default=None)

    @property
    def error(self) -> float:
        """The largest of all checkpoints; not a number if one of them is not."""
        return float(np.max([checkpoint.error for checkpoint in self.checkpoints]))

    def failures(self) -> Iterator[str]:
        """What is not as it must be, one sentence each."""
        if self.growth is not None and not self.growth <= ALLOWED_GROWTH:
            yield f"memory grew by {self.growth:.1%}; allowed: {ALLOWED_GROWTH:.0%}"
        if self.allowed_error is not None and not self.error <= self.allowed_error:
            yield (
                f"logits drifted by {self.error:.1e} from {self.reference}; "
                f"allowed: {self.allowed_error:.0e}"
            )
        if self.parallel.equal < self.parallel.sessions:
            yield (
                f"{self.parallel.equal} of {self.parallel.sessions} parallel sessions wrote what "
                "one alone wrote; allowed: all"
            )


def compared(records: Sequence[Record], walked: Path, reference: Path) -> tuple[Checkpoint, ...]:
    """The checkpoints of the walk in `walked`, with their error against that in `reference`."""
    return tuple(
        Checkpoint(
            tokens=record["tokens"],
            run=record["run"],
            seconds=record["seconds"],
            rss=record["rss"],
            error=_relative_error(
                logits_at(reference, record["tokens"]), logits_at(walked, record["tokens"])
            ),
        )
        for record in records
    )


def as_text(soak: Soak) -> str:
    """A table of the checkpoints, and below it what they mean."""
    stretch = soak.checkpoints[0].tokens
    rows = [
        (
            c.tokens,
            c.run,
            f"{stretch / c.seconds:.0f}",
            "-" if c.rss is None else f"{c.rss / 1e6:.1f}",
            f"{c.error:.1e}",
        )
        for c in soak.checkpoints
    ]
    calls = ", ".join(f"{count} x {size}" for size, count in soak.calls)
    growth = "not known" if soak.growth is None else f"{soak.growth:+.2%}"
    judged = "not judged" if soak.allowed_error is None else f"allowed: {soak.allowed_error:.0e}"
    parallel = soak.parallel
    return "\n".join(
        (
            markdown_table(rows, ("tokens", "run", "tok/s", "RSS (MB)", "error")),
            "",
            f"{soak.bundle} on {soak.engine}: {soak.weights}, {soak.text}, calls between two "
            f"checkpoints: {calls}",
            f"memory after the first checkpoint: {growth} (allowed: {ALLOWED_GROWTH:.0%})",
            f"largest error against {soak.reference}: {soak.error:.1e} ({judged})",
            f"{parallel.equal} of {parallel.sessions} parallel sessions wrote the "
            f"{parallel.written} tokens of one alone; their last "
            f"logits differ by {parallel.max_abs:.1e} at most",
        )
    )


def _relative_error(reference: Floats, actual: Floats) -> float:
    expected, got = reference.astype(np.float64), actual.astype(np.float64)
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))
