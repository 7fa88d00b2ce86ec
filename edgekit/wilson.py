"""Wilson's score interval of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""

import math

from edgekit.errors import UsageError

__all__ = ["wilson"]

Z_95 = 1.959963984540054


def wilson(correct: int, samples: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of `correct / samples`, 95 % by default; it never leaves 0 to 1.

    Unlike the normal approximation it holds near 0 and 1: 100 of 100 gives 0.963 to 1.

    Raises:
        UsageError: if `samples` is below 1, or `correct` is not among them.
    """
    if samples < 1 or not 0 <= correct <= samples:
        raise UsageError(f"{correct} of {samples} given; allowed: 0 to all of 1 or more samples")
    share, weight = correct / samples, z * z / samples
    middle = (share + weight / 2) / (1 + weight)
    spread = z * math.sqrt(share * (1 - share) / samples + weight / samples / 4) / (1 + weight)
    low = 0.0 if correct == 0 else middle - spread
    return low, 1.0 if correct == samples else middle + spread
