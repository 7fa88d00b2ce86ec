"""The `edgekit` command: one verb per file of this folder; what is heavy is imported by `run`.

A verb's file is called after the verb and holds `HELP`, `add_arguments(parser)` and `run(args)`.
"""

import argparse
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from edgekit import __version__
from edgekit.errors import EdgekitError, UsageError

__all__ = ["VERBS", "build_parser", "main"]

VERBS = (
    "convert",
    "distill",
    "tune",
    "adapter",
    "spin",
    "run",
    "chat",
    "profile",
    "eval",
    "inspect",
    "targets",
    "doctor",
)
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, like every other error of edgekit."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing but argparse and the verbs' own light files."""
    parser = Parser(
        prog="edgekit",
        description="Convert language models into bundles that run fast on Intel edge devices.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edgekit {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", dest="verb", required=True)
    for verb in VERBS:
        module = importlib.import_module(f"edgekit.cli.{verb}")
        child = verbs.add_parser(
            verb, help=module.HELP, description=module.__doc__, allow_abbrev=False
        )
        child.formatter_class = argparse.RawDescriptionHelpFormatter
        child.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )
        module.add_arguments(child)
        child.set_defaults(handler=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, 1 on failure, 2 on wrong usage, 130 when interrupted.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal cannot show
    try:
        args = build_parser().parse_args(arguments)
        code: int = args.handler(args)
        sys.stdout.flush()
    except EdgekitError as error:
        return _fail(error, debug="--debug" in arguments)
    except BrokenPipeError:
        # The reader has gone; without this, Python complains while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("edgekit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # the edge of the process: a bug of ours, or the system's refusal
        return _fail(error, debug="--debug" in arguments)
    return code


def _fail(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    message = " ".join(str(error).split())
    if not isinstance(error, EdgekitError):
        message = f"{type(error).__name__}: {message}; --debug shows where"
    print(f"edgekit: error: {message}", file=sys.stderr)
    return error.exit_code if isinstance(error, EdgekitError) else 1


if __name__ == "__main__":
    sys.exit(main())
