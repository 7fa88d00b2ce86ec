"""Curves that are known are found; points that no curve goes through are refused."""

import math

import pytest

from edgekit.distill.power_law import fit, tokens_without_each
from edgekit.errors import UsageError

POINTS = [(t, 50.0 * math.exp(3.0 * t**-0.2)) for t in (50_000, 100_000, 200_000, 400_000)]


def test_finds_the_curve_that_made_the_points() -> None:
    law = fit(POINTS, 50.0)
    assert (law.coefficient, law.exponent) == pytest.approx((3.0, 0.2))
    assert law.perplexity(10**6) == pytest.approx(50.0 * math.exp(3.0 * 10**-1.2))
    tokens = law.tokens(1.35)
    assert law.perplexity(tokens) == pytest.approx(1.35 * 50.0)
    assert tokens_without_each(POINTS, 50.0, 1.35) == pytest.approx((tokens, tokens))


def test_points_that_scatter_widen_the_range() -> None:
    scattered = [(t, p * (1.01 if i % 2 else 0.99)) for i, (t, p) in enumerate(POINTS)]
    low, high = tokens_without_each(scattered, 50.0, 1.2)
    assert low < fit(scattered, 50.0).tokens(1.2) < high


def test_a_curve_that_rises_comes_nowhere() -> None:
    assert fit([(t, 100.0 + t / 1e5) for t, _ in POINTS], 50.0).tokens(1.5) == math.inf


@pytest.mark.parametrize(
    "points",
    [POINTS[:2], [*POINTS, (10**6, 49.0)], [(0, 60.0), *POINTS], [POINTS[0]] * 3],
    ids=["two", "below-the-teacher", "no-tokens", "one-thrice"],
)
def test_what_is_refused(points: list[tuple[int, float]]) -> None:
    with pytest.raises(UsageError, match="3 or more at different tokens"):
        fit(points, 50.0)


def test_a_goal_that_is_no_goal() -> None:
    with pytest.raises(UsageError, match="above 1"):
        fit(POINTS, 50.0).tokens(1.0)
