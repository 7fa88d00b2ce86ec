"""Distil a transformer into a recurrent student: constant memory, constant time per token.

SOURCE is the teacher, as for convert. FILE is text (.txt .md .rst), conversations or texts
(.jsonl), or datasets:ID[:SPLIT]; FILE@3 counts three times. The unfinished run lies in STUDENT.run;
--resume goes on with it exactly. For many processes: torchrun, `accelerate launch -m edgekit …`.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.cli.arguments import add_json, layers, positive
from edgekit.cli.extras import extra
from edgekit.cli.output import as_json, as_table
from edgekit.command import setting

if TYPE_CHECKING:
    from edgekit.distill.run import DistillReport

__all__ = ["HELP", "add_arguments", "run"]

HELP = "distil a transformer into a recurrent student"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="STUDENT")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="what to learn from")
    parser.add_argument(
        "--recipe", default="general", metavar="NAME|FILE.toml", help="default: general"
    )
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the recipe, such as transfer.tokens=100000 or mixer='lolcats'",
    )
    parser.add_argument(
        "--softmax-layers", type=layers, metavar="0,5-7", help="layers that keep softmax attention"
    )
    parser.add_argument("--haystack", type=Path, metavar="FILE", help="text for niah-2 and niah-3")
    parser.add_argument("--init", metavar="STUDENT", help="an earlier student to start from")
    running = parser.add_argument_group("running")
    running.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    running.add_argument("--force", action="store_true", help="replace a student, forget a run")
    running.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    running.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    running.add_argument(
        "--shard", action="store_true", help="spread frozen weights over the processes (FSDP)"
    )
    running.add_argument(
        "--held-out", type=Path, metavar="FILE", help="text for the learning curve"
    )
    running.add_argument(
        "--evaluate-tokens", type=positive, metavar="N", help="trained tokens between its points"
    )
    running.add_argument(
        "--checkpoint-seconds", type=positive, default=120, metavar="N", help="default: 120"
    )
    running.add_argument(
        "--stop-after", type=positive, metavar="SECONDS", help="then save and stop, to be resumed"
    )
    running.add_argument(
        "--finish", action="store_true", help="write the student that an unfinished run has so far"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Distil and print the report; returns the exit code."""
    from edgekit.cli.progress import Progress

    with extra("train"):
        from edgekit.distill.recipe import load_recipe
        from edgekit.distill.run import Settings, distill
    overrides = dict(args.set)
    if args.softmax_layers is not None:
        overrides["softmax_layers"] = list(args.softmax_layers)
    settings = Settings(
        precision=args.precision,
        cpu=args.cpu,
        shard=args.shard,
        held_out=args.held_out,
        evaluate_tokens=args.evaluate_tokens,
        checkpoint_seconds=args.checkpoint_seconds,
        stop_after=args.stop_after,
        finish=args.finish,
    )
    with Progress() as progress:
        report = distill(
            args.source,
            args.output,
            load_recipe(args.recipe, overrides),
            data=args.data,
            haystack=args.haystack,
            init=args.init,
            settings=settings,
            resume=args.resume or args.finish,
            force=args.force,
            progress=progress.step,
        )
    print(as_json(report) if args.json else _table(report))
    return 0


def _table(report: "DistillReport") -> str:
    if not report.finished:
        return f"stopped; the run is in {report.out}: the same command with --resume goes on"
    rows = [("student", str(report.out))]
    for record in report.training:
        loss = "-" if record.loss is None else f"{record.loss:.4f}"
        told = f"{record.tokens:,} tokens, {record.seconds:.0f} s, last loss {loss}"
        rows.append((f"stage {record.stage}", told))
    rows += [(name, f"{value:.2f}") for name, value in report.metrics.items()]
    return as_table(rows)
