"""Measure how well a bundle, or a source in PyTorch, predicts text.

Perplexity reads the text in windows without overlap (or --stride apart), each from an empty state
and without a beginning-of-text token.
"""

import argparse
from pathlib import Path

from edgekit.bundle import MANIFEST
from edgekit.cli.arguments import add_engine, add_json, positive
from edgekit.cli.extras import extra
from edgekit.cli.output import as_json, as_table, read_text

__all__ = ["HELP", "add_arguments", "run"]

HELP = "measure quality: perplexity"
TASKS = ("perplexity",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("model", metavar="BUNDLE|SOURCE")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="read in this order"
    )
    parser.add_argument("--window", type=positive, default=1024, metavar="N", help="in tokens")
    parser.add_argument("--stride", type=positive, metavar="N", help="default: the window")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="default: the whole text")
    add_engine(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    from edgekit.cli.progress import Progress
    from edgekit.config import dump
    from edgekit.eval.perplexity import Options, bundle_perplexity, source_perplexity

    options = Options(window=args.window, stride=args.stride, max_tokens=args.max_tokens)
    text = "".join(read_text(path) for path in args.text)
    with Progress() as progress:
        if (Path(args.model) / MANIFEST).is_file():
            result = bundle_perplexity(
                args.model,
                text,
                options,
                engine=args.engine,
                device=args.device,
                threads=args.threads,
                progress=progress.step,
            )
        else:
            with extra("convert"):
                result = source_perplexity(args.model, text, options, progress=progress.step)
    row = {"model": args.model, "task": args.task, **dump(result)}
    row |= {"window": options.window, "stride": options.step}
    print(as_json(row) if args.json else as_table((key, _short(v)) for key, v in row.items()))
    return 0


def _short(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return " to ".join(f"{item:.4f}" for item in value)
    return "-" if value is None else value
