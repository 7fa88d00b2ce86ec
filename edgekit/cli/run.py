"""Continue a prompt with a bundle; the text streams to stdout.

The prompt is put into the model's chat template where the bundle has one; --raw sends it as it is.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.cli.arguments import (
    add_adapters,
    add_engine,
    add_graph,
    add_json,
    opened,
    positive,
)
from edgekit.cli.output import as_json
from edgekit.cli.sampling import add_sampling, settings
from edgekit.config import dump
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.runtime import GenerationStats, Model, ScoredPiece
    from edgekit.runtime.sampling import GenerationSettings

__all__ = ["HELP", "add_arguments", "run"]

HELP = "answer a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument(
        "-p", "--prompt", required=True, help="the text; `-` reads it from standard input"
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture that the prompt is about; repeatable (vision-language models)",
    )
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    add_engine(parser)
    add_graph(parser)
    add_adapters(parser)
    add_sampling(parser)
    parser.add_argument(
        "--num-beams", type=positive, default=1, metavar="N", help="above 1: beam search"
    )
    parser.add_argument(
        "--scores",
        action="store_true",
        help="say how far the model looked at the pictures (bundles of convert --spin-scores)",
    )
    parser.add_argument("--stats", action="store_true", help="print the speed to stderr")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Generate and print; returns the exit code."""
    from edgekit.runtime import GenerationOptions

    options = settings(args)
    options["num_beams"] = args.num_beams
    GenerationOptions.of(options)  # refuses a wrong flag before the model is loaded
    if args.scores and args.num_beams > 1:
        raise UsageError(f"--scores given with --num-beams {args.num_beams}; allowed: with 1")
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    model = opened(args)
    if not args.raw and model.tokenizer.has_chat_template:
        prompt = model.chat_prompt([{"role": "user", "content": prompt}], images=len(args.image))
    pieces: list[ScoredPiece] = []
    if args.scores:
        pieces = _scored(model, prompt, args.image, options, silent=args.json)
        text = "".join(piece.text for piece in pieces)
    else:
        text = _generate(model, prompt, args.image, options, silent=args.json)
    if args.json:
        found = _result(model, prompt, text)
        print(as_json(found | _masses(pieces) if args.scores else found))
    elif args.scores:
        print(_mass_line(pieces), file=sys.stderr)
    if args.stats and model.last_stats is not None:
        print(stats_line(model, model.last_stats), file=sys.stderr)
    return 0


def _generate(
    model: "Model",
    prompt: str,
    images: list[Path],
    options: "GenerationSettings",
    *,
    silent: bool,
) -> str:
    """The whole text, which was also shown as it came unless `silent`."""
    if options["num_beams"] > 1 or silent:
        text = model.generate(prompt, images=images, **options)
        if not silent:
            print(text)
        return text
    pieces = []
    for piece in model.stream(prompt, images=images, **options):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def _scored(
    model: "Model",
    prompt: str,
    images: list[Path],
    options: "GenerationSettings",
    *,
    silent: bool,
) -> "list[ScoredPiece]":
    """The text in pieces, each also shown as it came unless `silent`."""
    pieces = []
    for piece in model.stream(prompt, images=images, with_scores=True, **options):
        if not silent:
            print(piece.text, end="", flush=True)
        pieces.append(piece)
    if not silent:
        print()
    return pieces


def _masses(pieces: "list[ScoredPiece]") -> dict[str, object]:
    return {
        "pieces": [piece.text for piece in pieces],
        "image_mass": [piece.image_mass for piece in pieces],
    }


def _mass_line(pieces: "list[ScoredPiece]") -> str:
    """One line of how far the model looked at the pictures."""
    found = [piece.image_mass for piece in pieces if piece.image_mass is not None]
    if not found:
        return "image mass: none, without a picture or without a word"
    return f"image mass: {found[0]:.2f} at the first piece of text, {found[-1]:.2f} at the last"


def _result(model: "Model", prompt: str, text: str) -> dict[str, object]:
    stats = model.last_stats
    rate = {} if stats is None else {"tokens_per_second": stats.tokens_per_second}
    return {
        "prompt": prompt,
        "text": text,
        "engine": model.engine,
        "device": model.device,
        "load_seconds": model.load_seconds,
        "stats": {**dump(stats), **rate} if stats else None,
    }


def stats_line(model: "Model", stats: "GenerationStats") -> str:
    """One line of what a generation took."""
    return (
        f"{model.engine} {model.device}: load {model.load_seconds:.2f} s, "
        f"{stats.prompt_tokens} prompt tokens, first token after "
        f"{1e3 * stats.ttft_seconds:.0f} ms, "
        f"{stats.new_tokens} new tokens at {stats.tokens_per_second:.1f} tok/s "
        f"({', '.join(stats.endings)})"
    )
