"""Tune an adapter: AFLoRA, LoRA or VeRA on a model or on a student of it.

A line of FILE.jsonl is {"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...};
FILE@3 counts three times. ADAPTER becomes what PEFT saves, with tune.json (how it was made, and
what training took), metrics.jsonl, loss.png, freeze.png (when which projection froze) and, for
AFLoRA, lora/: the same as plain LoRA. The unfinished run lies in ADAPTER.run; --resume goes on.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.cli.arguments import add_json, positive
from edgekit.cli.extras import extra
from edgekit.cli.output import as_json, as_table, size
from edgekit.command import floats, setting

if TYPE_CHECKING:
    from edgekit.adapters.tune.manifest import TuneManifest
    from edgekit.adapters.tune.run import TuneReport

__all__ = ["HELP", "add_arguments", "run"]

HELP = "tune an AFLoRA, LoRA or VeRA adapter"
METHODS = ("aflora", "lora", "vera")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a model as for convert, or a student")
    add("-o", "--output", type=Path, required=True, metavar="ADAPTER")
    add("--data", nargs="+", default=[], metavar="FILE.jsonl", help="what to learn from")
    add("--method", choices=METHODS, help="picks the recipe of that name (default: aflora)")
    add("--recipe", metavar="NAME|FILE.toml", help="default: that of the method")
    add(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the recipe, such as steps=500, lr=2e-3 or freeze.interval=20",
    )
    add("--student", metavar="NAME|DIR", help="tune this student of SOURCE")
    add("--held-out", type=Path, metavar="FILE.jsonl", help="examples to measure with")
    add(
        "--lr-search",
        type=_rates,
        default=(),
        metavar="LR,LR,LR",
        help="try these rates on shorter runs, and take the best on held-out examples",
    )
    running = parser.add_argument_group("running")
    running.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    running.add_argument("--force", action="store_true", help="replace an adapter, forget a run")
    running.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    running.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    running.add_argument(
        "--checkpoint-seconds", type=positive, default=120, metavar="N", help="default: 120"
    )
    running.add_argument(
        "--stop-after", type=positive, metavar="SECONDS", help="then save and stop, to be resumed"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Tune and print the report; returns the exit code."""
    from edgekit.cli.progress import Progress

    with extra("train"):
        from edgekit.adapters.tune.recipe import load_recipe
        from edgekit.adapters.tune.run import Settings, tune
    overrides = dict(args.set)
    if args.method and args.recipe:
        overrides.setdefault("method", args.method)
    recipe = load_recipe(args.recipe or args.method or METHODS[0], overrides)
    settings = Settings(
        precision=args.precision,
        cpu=args.cpu,
        lr_search=args.lr_search,
        checkpoint_seconds=args.checkpoint_seconds,
        stop_after=args.stop_after,
    )
    with Progress() as progress:
        report = tune(
            args.source,
            args.output,
            recipe,
            data=args.data,
            student=args.student,
            held_out=args.held_out,
            settings=settings,
            resume=args.resume,
            force=args.force,
            progress=progress.step,
        )
    print(as_json(report) if args.json else _table(report))
    return 0


def _rates(text: str) -> tuple[float, ...]:
    return floats(text, "rates separated by commas, such as 1e-3,2e-3,5e-3")


def _table(report: "TuneReport") -> str:
    if report.manifest is None:
        return f"stopped; the run is in {report.out}: the same command with --resume goes on"
    return as_table([("adapter", str(report.out)), *_rows(report.manifest)])


def _rows(manifest: "TuneManifest") -> list[tuple[str, str]]:
    trained, memory = manifest.trainable, manifest.memory
    rows = [
        ("method", f"{manifest.method}, {' then '.join(manifest.order)}"),
        ("steps", f"{manifest.steps:,}, {manifest.seconds_per_step:.2f} s each (median)"),
        ("trained", f"{trained.start:,} elements to {trained.end:,}, mean {trained.mean:,.0f}"),
        ("memory", f"gradients and optimiser {size(memory.peak)} to {size(memory.end)}"),
    ]
    for trial in manifest.search:
        loss = "not finite" if trial.held_out_loss is None else f"{trial.held_out_loss:.4f}"
        rows.append((f"lr {trial.lr:g}", f"held-out loss {loss} after {trial.steps} steps"))
    if manifest.search:
        rows.append(("chosen", f"lr {manifest.recipe['lr']:g}"))
    rows += [(name.replace("_", " "), f"{value:.4f}") for name, value in manifest.metrics.items()]
    dropped = sum(file["dropped"] for file in manifest.data)
    return rows + ([("too long", f"{dropped} examples left out")] if dropped else [])
