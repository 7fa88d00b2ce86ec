"""Train a small vision-language model on composed pictures and measure SPIN on it.

Example:
    python -m edgekit.data.stamps -o stamps
    python -m edgekit.eval.stamps -o spin-stamps --data stamps

The folder gets `metrics.jsonl` and `loss.png` of the training, `model`, a LLaVA that transformers
opens and `edgekit convert` reads, `results.json` and `table.md`. It takes hours; the same command
again goes on where the last one was killed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from edgekit.command import Told, guarded, module_parser, numbers
from edgekit.config import dump
from edgekit.data.stamp_scenes import StampBook
from edgekit.errors import UsageError
from edgekit.eval.stamps import checkpoint
from edgekit.eval.stamps.experiment import Measuring, measured
from edgekit.eval.stamps.lessons import Lessons
from edgekit.eval.stamps.model import assemble, write_model
from edgekit.eval.stamps.plot import draw_losses
from edgekit.eval.stamps.report import report
from edgekit.eval.stamps.training import METRICS, Precision, Training, read_metrics, train
from edgekit.sources import open_source
from edgekit.sources.picture_model import open_picture_model

__all__ = ["main"]

SETTINGS = "training.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and print the tables.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args = _parser().parse_args(argv)
    return guarded("stamps", lambda: _made(args))


def _made(args: argparse.Namespace) -> str:
    fields = ("eye_steps", "eye_batch", "steps", "batch", "micro", "rate", "warmup", "questions")
    training = Training(
        precision=args.precision, seed=args.seed, **{name: getattr(args, name) for name in fields}
    )
    measuring = Measuring(
        scenes=args.scenes,
        asked=args.asked,
        suppress=args.suppress,
        tokens=args.tokens,
        seed=args.seed,
    )
    told = Told()
    settings = {"text": args.text, **dump(training)}
    _check(args.output / SETTINGS, settings)
    if not (args.output / "model").is_dir():
        _train(args, training, settings, told)
    if args.only_train:
        return f"{args.output / 'model'}: trained"
    pictures = open_picture_model(open_source(args.output / "model"))
    pictures.model.to(args.device)
    journal = args.output / "results.jsonl"
    results = measured(pictures, args.data, measuring, journal=journal, progress=told)
    whole = {"training": settings, "measuring": dump(measuring), "methods": results}
    (args.output / "results.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    table = report(results)
    (args.output / "table.md").write_text(table, encoding="utf-8")
    return table


def _check(file: Path, settings: dict[str, Any]) -> None:
    """Whether the folder is new or of the same training."""
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise UsageError(f"{file} is of other settings; give another folder")


def _train(
    args: argparse.Namespace, training: Training, settings: dict[str, Any], told: Told
) -> None:
    book = StampBook.read(args.data)
    pictures = assemble(open_source(args.text), training.seed)
    pictures.model.to(args.device)
    lessons = Lessons(pictures, book, seed=training.seed, questions=training.questions)
    train(
        pictures,
        lessons,
        training,
        args.output,
        objects=book.names,
        save_every=args.save_every,
        progress=told,
    )
    draw_losses(read_metrics(args.output / METRICS), args.output / "loss.png")
    text = json.dumps(settings, indent=1) + "\n"
    (args.output / SETTINGS).write_text(text, encoding="utf-8")
    write_model(pictures, args.output / "model")
    checkpoint.forget(args.output)


def _parser() -> argparse.ArgumentParser:
    usual, measuring = Training(), Measuring()
    parser = module_parser("edgekit.eval.stamps", __doc__)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    add("--data", type=Path, required=True, metavar="DIR", help="of edgekit.data.stamps")
    add("--text", default="smollm2-135m-instruct", help="the language model, which stays as it is")
    add("--eye-steps", type=int, default=usual.eye_steps, metavar="N", help="steps of stage 1")
    add("--eye-batch", type=int, default=usual.eye_batch, metavar="N", help="pictures of each")
    add("--steps", type=int, default=usual.steps, metavar="N", help="steps of stage 2")
    add("--batch", type=int, default=usual.batch, metavar="N", help="captions of each")
    add("--micro", type=int, default=usual.micro, metavar="N", help="captions at a time")
    add("--rate", type=float, default=usual.rate, help="the highest learning rate")
    add("--warmup", type=int, default=usual.warmup, metavar="N", help="steps of each stage")
    add("--questions", type=float, default=usual.questions, help="their share, beside captions")
    add("--precision", choices=get_args(Precision), default=usual.precision)
    add("--seed", type=int, default=usual.seed, metavar="N")
    add("--save-every", type=float, default=300.0, metavar="S", help="seconds between checkpoints")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--only-train", action="store_true", help="leave out the measurement")
    add("--scenes", type=int, default=measuring.scenes, metavar="N", help="to choose on, and test")
    add(
        "--asked", type=int, default=measuring.asked, metavar="N", help="pictures that POPE asks of"
    )
    add("--suppress", type=numbers, default=measuring.suppress, metavar="N,N", help="heads, to try")
    add("--tokens", type=int, default=measuring.tokens, metavar="N", help="of a caption at most")
    return parser


if __name__ == "__main__":
    sys.exit(main())
