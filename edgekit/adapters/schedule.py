"""What part of the projections is still trained at a step (AFLoRA, arXiv 2403.13269, section 3).

With T steps, a start t_i and a final phase of t_f steps, and x = (t - t_i) / (T - t_f - t_i):

    cubic      r = (1 - x)^power    power 3 in the paper
    late       r = 1 - x^power      power 2 in the authors' GSM8k code
    step       r = 0 from t_i on
    never      r = 1

and r = 1 up to t_i, r = 0 after T - t_f.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from edgekit.errors import UsageError

__all__ = ["FreezeSchedule", "Shape", "steps_of"]

Shape = Literal["cubic", "late", "step", "never"]
EPOCHS = re.compile(r"([0-9]+(?:\.[0-9]+)?)ep")


@dataclass(frozen=True, kw_only=True, slots=True)
class FreezeSchedule:
    """The trained part as a function of the step.

    Attributes:
        total: optimiser steps, T.
        start: last step at which everything is trained, t_i.
        final: steps at the end in which nothing is, t_f.
        shape: of the way between them.
        power: of that shape.
    """

    total: int
    start: int
    final: int
    shape: Shape = "cubic"
    power: float = 3.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming what is outside.
        """
        if self.shape not in get_args(Shape):
            allowed = ", ".join(get_args(Shape))
            raise UsageError(f"schedule {self.shape!r} given; allowed: {allowed}")
        if self.power <= 0:
            raise UsageError(f"power {self.power} given; allowed: above 0")
        if min(self.total, self.start, self.final) < 0 or self.start + self.final > self.total:
            raise UsageError(
                f"freezing from step {self.start}, and {self.final} steps without any, given for "
                f"{self.total} steps; allowed: 0 or more each, and together no more than these"
            )

    @property
    def end(self) -> int:
        """The step after which nothing is trained, T - t_f."""
        return self.total - self.final

    def fraction(self, step: int) -> float:
        """Part of the projections that is trained at `step`, from 0; 1 to 0, never rising."""
        if self.shape == "never" or step <= self.start:
            return 1.0
        if self.shape == "step" or step > self.end:
            return 0.0
        x = (step - self.start) / (self.end - self.start)
        kept = (
            math.pow(1.0 - x, self.power) if self.shape == "cubic" else 1 - math.pow(x, self.power)
        )
        return min(max(kept, 0.0), 1.0)

    def mean(self) -> float:
        """Mean of `fraction` over all steps; 1 where there are none."""
        if not self.total:
            return 1.0
        return sum(self.fraction(step) for step in range(self.total)) / self.total


def steps_of(span: float | str, *, total: int, per_epoch: int | None) -> int:
    """A span of training in steps.

    Args:
        span: below 1 a fraction of `total`; `"2ep"` so many epochs; else a number of steps.
        total: steps of the whole training.
        per_epoch: steps of one epoch; None if it is not known.

    Raises:
        UsageError: for anything else, or epochs of unknown length.
    """
    if isinstance(span, str):
        found = EPOCHS.fullmatch(span)
        if not found or per_epoch is None:
            why = "; the length of an epoch is not known here" if found else ""
            raise UsageError(
                f"span {span!r} given; allowed: a fraction, steps, or epochs such as '2ep'{why}"
            )
        return round(float(found[1]) * per_epoch)
    if span < 0 or (span >= 1 and span != int(span)):
        raise UsageError(f"span {span} given; allowed: 0 to 1, or whole steps")
    return round(span * total) if span < 1 else int(span)
