"""Arguments that verbs share: layer ranges, the flags of engine and device."""

import argparse
from collections.abc import Callable

from edgekit.command import whole
from edgekit.targets.schema import ENGINES

__all__ = [
    "add_device",
    "add_engine",
    "add_json",
    "choices",
    "layers",
    "natural",
    "pair",
    "positive",
]


def layers(text: str) -> tuple[int, ...]:
    """Layer indices from single ones and ranges that include both ends: `0,5-7` is 0, 5, 6, 7.

    Raises:
        argparse.ArgumentTypeError: for anything else, or a range that runs backwards.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            low = whole(first)
            high = whole(last) if dash else low
        except ValueError:
            low, high = 1, 0
        if low > high:
            raise argparse.ArgumentTypeError(
                f"{part!r} in {text!r}; allowed: layers and rising ranges, such as 0,5-7"
            )
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def choices(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A type for a comma separated list, each item one of `allowed` and given once."""

    def parse(text: str) -> tuple[str, ...]:
        items = tuple(part.strip() for part in text.split(","))
        for item in items:
            if item not in allowed or items.count(item) > 1:
                raise argparse.ArgumentTypeError(
                    f"{item!r} in {text!r}; allowed: {', '.join(allowed)}, each once"
                )
        return items

    return parse


def pair(text: str) -> tuple[float, float]:
    """Two numbers, `0.5,1`.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; allowed: two numbers, such as 0.5,1"
        ) from None
    return first, second


def natural(text: str) -> int:
    """A whole number, 0 or more.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        return whole(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; allowed: a whole number, 0 or more"
        ) from None


def positive(text: str) -> int:
    """A whole number, 1 or more.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    value = natural(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; allowed: a whole number, 1 or more")
    return value


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add `--engine`, `--device` and `--threads`."""
    parser.add_argument(
        "--engine", choices=ENGINES, help="default: the target's, if it is here, else the other"
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--threads`."""
    parser.add_argument("--device", help="such as CPU, GPU or NPU (default: the target's)")
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads (default: the target's, or the engine's choice)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
