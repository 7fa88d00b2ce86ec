"""A student's distance from its teacher as a function of tokens, and what it extrapolates to.

ln(perplexity / teacher's perplexity) = c t^-b, fitted in logarithms by least squares. The rate of
learning changed while the points were made and will be another in a longer run, so this says how
far away a goal is, not when it is reached.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.errors import UsageError

__all__ = ["FEWEST", "PowerLaw", "fit", "tokens_without_each"]

FEWEST = 3
Point = tuple[int, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerLaw:
    """The fitted curve.

    Attributes:
        coefficient: c, nats.
        exponent: b.
        teacher: perplexity of the teacher on the same text.
    """

    coefficient: float
    exponent: float
    teacher: float

    def perplexity(self, tokens: float) -> float:
        """After so many tokens."""
        return self.teacher * math.exp(self.coefficient * tokens**-self.exponent)

    def tokens(self, ratio: float) -> float:
        """Tokens after which the perplexity is `ratio` times the teacher's.

        Returns:
            Infinity where the curve does not fall.

        Raises:
            UsageError: for a ratio of 1 or less.
        """
        if ratio <= 1:
            raise UsageError(f"ratio {ratio} given; allowed: above 1")
        if self.exponent <= 0:
            return math.inf
        exponent = math.log(self.coefficient / math.log(ratio)) / self.exponent
        return math.exp(exponent) if exponent < math.log(1e18) else math.inf


def fit(points: Sequence[Point], teacher: float) -> PowerLaw:
    """The least-squares curve through tokens and perplexities.

    Args:
        points: three or more, tokens rising, each perplexity above the teacher's.
        teacher: its perplexity.

    Raises:
        UsageError: for points that no such curve goes through.
    """
    usable = len({tokens for tokens, _ in points}) >= FEWEST
    if not usable or any(t <= 0 or p <= teacher for t, p in points):
        raise UsageError(
            f"{len(points)} points given; allowed: {FEWEST} or more at different tokens, each "
            f"above the teacher's perplexity of {teacher:.4g}"
        )
    xs = [math.log(tokens) for tokens, _ in points]
    ys = [math.log(math.log(perplexity / teacher)) for _, perplexity in points]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )
    return PowerLaw(coefficient=math.exp(y - slope * x), exponent=-slope, teacher=teacher)


def tokens_without_each(
    points: Sequence[Point], teacher: float, ratio: float
) -> tuple[float, float]:
    """The least and the most tokens that `PowerLaw.tokens` gives with one point left out."""
    found = [
        fit([*points[:i], *points[i + 1 :]], teacher).tokens(ratio) for i in range(len(points))
    ]
    return min(found), max(found)
