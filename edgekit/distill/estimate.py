"""A mean over rows of text with its interval."""

import math
from dataclasses import dataclass

import torch

__all__ = ["Estimate", "estimate"]

NORMAL_95 = 1.96


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over rows.

    Attributes:
        value: the mean.
        spread: half of its 95 % interval over the rows (normal); None for a single row.
    """

    value: float
    spread: float | None

    def __format__(self, spec: str) -> str:
        """The mean, and its spread where there is one, each as `spec` says."""
        told = format(self.value, spec)
        return told if self.spread is None else f"{told} ± {format(self.spread, spec.lstrip('+'))}"


def estimate(values: torch.Tensor) -> Estimate:
    """The mean of `values [N]`, one per row."""
    wide, count = values.double(), len(values)
    spread = None if count < 2 else NORMAL_95 * wide.std().item() / math.sqrt(count)
    return Estimate(value=wide.mean().item(), spread=spread)
