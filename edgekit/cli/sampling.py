"""The flags of `run` and `chat` that say how to continue a prompt."""

import argparse
from typing import TYPE_CHECKING

from edgekit.cli.arguments import natural, positive

if TYPE_CHECKING:
    from edgekit.runtime.sampling import GenerationSettings

__all__ = ["add_sampling", "settings"]


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the flags; their ranges are checked by `GenerationOptions`."""
    group = parser.add_argument_group("generation")
    group.add_argument("-n", "--max-new-tokens", type=positive, default=128, metavar="N")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy"
    )
    group.add_argument("--top-k", type=natural, default=0, metavar="K", help="0: all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    group.add_argument("--seed", type=natural, metavar="N", help="makes sampling repeatable")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-text token")


def settings(args: argparse.Namespace) -> "GenerationSettings":
    """The flags as keyword arguments of `Model.generate`."""
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "stop": tuple(args.stop),
        "ignore_eos": args.ignore_eos,
    }
