"""Arguments that verbs share: layer ranges, the flags of engine and device."""

import argparse
import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.command import whole
from edgekit.targets.schema import ENGINES, GRAPHS

if TYPE_CHECKING:
    from edgekit.runtime import Model

__all__ = [
    "add_adapters",
    "add_device",
    "add_engine",
    "add_graph",
    "add_json",
    "choices",
    "heard",
    "layers",
    "natural",
    "opened",
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
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads (default: the target's, or the engine's choice)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", help="such as CPU, GPU or NPU (default: the target's)")


def add_graph(parser: argparse.ArgumentParser) -> None:
    """Add `--graph`."""
    parser.add_argument(
        "--graph",
        choices=GRAPHS,
        help="OpenVINO: `stepped` decodes faster, `dynamic` takes less memory (default: the "
        "target's)",
    )


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Add `--adapter`, repeatable, for bundles with adapter slots."""
    parser.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        type=_weighted,
        default=[],
        metavar="PATH[:WEIGHT]",
        help="a PEFT adapter for a bundle with adapter slots; several are added up",
    )


def _weighted(text: str) -> tuple[str, float]:
    """An adapter's directory and weight; a directory of the whole name comes first."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not path or not math.isfinite(weight):
        raise argparse.ArgumentTypeError(
            f"{text!r} given; allowed: PATH or PATH:WEIGHT, such as my-adapter:0.5"
        )
    return path, weight


def opened(args: argparse.Namespace) -> "Model":
    """The model that `bundle`, the engine's flags, `--graph` and `--adapter` ask for."""
    from edgekit.runtime import load

    model = load(
        args.bundle,
        engine=args.engine,
        device=args.device,
        threads=args.threads,
        graph=args.graph,
    )
    _use_adapters(model, args.adapters)
    return model


def _use_adapters(model: "Model", adapters: Sequence[tuple[str, float]]) -> None:
    """Load and set adapters, directories with weights; warnings become lines on stderr."""
    if not adapters:
        return
    with heard():
        model.set_adapters({model.load_adapter(path): w for path, w in adapters})


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Print warnings as the command prints everything else that it has to say."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in found:
        print(f"edgekit: {warning.message}", file=sys.stderr)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
