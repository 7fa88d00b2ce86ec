"""What edgekit's commands share, `python -m edgekit.…` and the verbs of the command line."""

import argparse
import shlex
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

from edgekit.errors import EdgekitError

__all__ = [
    "Told",
    "floats",
    "guarded",
    "last_line",
    "module_parser",
    "numbers",
    "parsed",
    "setting",
    "whole",
]

SECONDS = 10.0  # between two lines


class Told:
    """Progress in plain lines on stderr, not too many of them."""

    def __init__(self) -> None:
        self._last: float | None = None

    def __call__(self, name: str, number: int, count: int) -> None:
        """Say that step `number` (from 0) of `count`, called `name`, begins."""
        now = time.monotonic()
        if self._last is None or now - self._last > SECONDS:
            self._last = now
            print(f"[{number + 1}/{count}] {name}", file=sys.stderr, flush=True)


def last_line(text: str) -> str:
    """The last line that a program wrote, which says what went wrong; `no message` without one."""
    return (text.strip().splitlines() or ["no message"])[-1].strip()


def guarded(name: str, work: Callable[[], str]) -> int:
    """Print what `work` returns, or its error as one line.

    Args:
        name: of the command, which the error begins with.
        work: the command.

    Returns:
        The exit code.
    """
    try:
        print(work())
    except EdgekitError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{name}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def module_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m module`, whose help is the module's own `doc` as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, str]:
    """The arguments of a `module_parser`, and the command as it can be typed again.

    Args:
        parser: of the module.
        argv: the arguments after the program's name; None: those of this process.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    return parser.parse_args(given), shlex.join([*parser.prog.split(), *given])


def setting(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`, the value as TOML writes it; a bare word is a string.

    Raises:
        argparse.ArgumentTypeError: if there is no `=`.
    """
    key, found, value = text.partition("=")
    if not found or not key:
        raise argparse.ArgumentTypeError(f"{text!r} given; allowed: KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, 0 or more, from `0,1024,4096`.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        return tuple(whole(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; allowed: whole numbers separated by commas, such as 0,1024"
        ) from None


def floats(text: str, allowed: str) -> tuple[float, ...]:
    """Numbers separated by commas.

    Args:
        text: what was given.
        allowed: said in the error, with an example.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given; allowed: {allowed}") from None


def whole(text: str) -> int:
    """A number of digits alone, 0 or more.

    Raises:
        ValueError: for anything else, `1_000` and other digits than 0 to 9 too.
    """
    if not (text.strip().isascii() and text.strip().isdigit()):
        raise ValueError(text)
    return int(text)
