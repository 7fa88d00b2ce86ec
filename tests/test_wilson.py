import pytest

from edgekit.errors import UsageError
from edgekit.wilson import wilson


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    [
        (20, 25, 0.609, 0.911),  # the spans that the specification gives for 25 samples
        (12, 25, 0.300, 0.665),
        (25, 25, 0.867, 1.0),
        (0, 100, 0.0, 0.037),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_known_intervals(correct: int, samples: int, low: float, high: float) -> None:
    assert wilson(correct, samples) == pytest.approx((low, high), abs=5e-4)


def test_interval_is_symmetric_in_right_and_wrong() -> None:
    low, high = wilson(30, 200)
    assert wilson(170, 200) == pytest.approx((1 - high, 1 - low))


def test_interval_covers_the_true_share() -> None:
    """Of binomial draws with p = 0.9 and n = 100, close to 95 % of the intervals hold p."""
    from math import comb

    inside = (k for k in range(101) if wilson(k, 100)[0] <= 0.9 <= wilson(k, 100)[1])
    covered = sum(comb(100, k) * 0.9**k * 0.1 ** (100 - k) for k in inside)
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize(("correct", "samples"), [(0, 0), (2, 1), (-1, 5)])
def test_impossible_counts(correct: int, samples: int) -> None:
    with pytest.raises(UsageError, match="given; allowed: 0 to all"):
        wilson(correct, samples)
