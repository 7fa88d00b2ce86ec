"""Mixers and their options compared at equal tokens: which defaults follow.

Example:
    python -m edgekit.distill.ablation smollm2-135m-instruct --data text.jsonl \
        --held-out prose.txt code.txt --tokens 500000 -o ablation

All variants learn stage 1 at once, from one pass of the teacher per batch. It writes
`ablation/ablation.md`, `.json`, `.png` and the losses of every step. The unfinished run lies in
`ablation/run`: the same command again goes on with it exactly.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.command import Told, guarded, module_parser, numbers, parsed, setting
from edgekit.config import dump
from edgekit.distill import checkpoint
from edgekit.distill.ablation_plot import draw_ablation
from edgekit.distill.ablation_report import Ablation, as_markdown
from edgekit.distill.assembly import Progress
from edgekit.distill.folder import claimed
from edgekit.distill.metrics import FILE, read_metrics
from edgekit.distill.processes import Processes
from edgekit.distill.trial import AblationSettings, Trial
from edgekit.distill.variants import Variants, load_variants
from edgekit.errors import UsageError
from edgekit.models.precision import choose_precision
from edgekit.sources import open_source

__all__ = ["ablate", "main"]

RESULT, TABLE, PICTURE, RUN = "ablation.json", "ablation.md", "ablation.png", "run"


def ablate(
    source: str | Path,
    out: str | Path,
    variants: Variants,
    *,
    data: Sequence[str | Path],
    held_out: Sequence[Path],
    layers: Sequence[int] | None = None,
    settings: AblationSettings | None = None,
    force: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> Ablation | None:
    """Train every variant on the same rows and measure them.

    Args:
        source: the teacher, as for `convert`.
        out: a directory for the results; an unfinished run in it is gone on with.
        variants: `load_variants` gives them.
        data: what to learn from, as for `distill`.
        held_out: texts to measure on, at least one.
        layers: learn these only; None: all that the base converts.
        settings: how to run.
        force: replace results that are there, and forget an unfinished run.
        progress: called with a step's name, its number and the count of steps.
        command: what was typed, for the table.

    Returns:
        The figures, which are in `out` too; None when `stop_after` ended the run.

    Raises:
        UsageError: for an argument that is not allowed, or results that are already there.
        SourceError: if the teacher cannot be read.
        TrainingError: if no variant learns any more, or the unfinished run is of other settings.
    """
    choice, final = settings or AblationSettings(), Path(os.path.realpath(out))
    if (final / RESULT).exists() and not force:
        raise UsageError(f"{out}: holds a finished ablation; give another name, or --force")
    processes = Processes(choose_precision(choice.precision, cpu=choice.cpu), cpu=choice.cpu)
    if processes.count > 1:
        raise UsageError(f"{processes.count} processes started; allowed: an ablation runs in one")
    if layers is not None:
        variants = _restricted(variants, layers, open_source(source).config.num_layers)
    trial = Trial.open(source, variants, data, held_out, processes, choice, progress)
    with claimed(final / RUN, resume=not force, force=force):
        outcome = trial.train(final / RUN, choice, progress)
        if not outcome.finished:
            return None
        result = trial.measure(outcome, read_metrics(final / RUN), progress)
        _write(result, final, command)
        checkpoint.forget(final / RUN)
    return result


def _restricted(variants: Variants, layers: Sequence[int], count: int) -> Variants:
    """The same variants, learning `layers` only."""
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside or not layers:
        raise UsageError(f"layer {outside[0] if outside else ''} given; allowed: 0 to {count - 1}")
    kept = tuple(layer for layer in range(count) if layer not in layers)
    recipes = {n: replace(plan, softmax_layers=kept) for n, plan in variants.recipes.items()}
    return replace(variants, recipes=recipes)


def _write(result: Ablation, out: Path, command: str) -> None:
    """The results; the JSON comes last, since it tells that all are there."""
    (out / TABLE).write_text(as_markdown(result, command), encoding="utf-8")
    draw_ablation(result, out / PICTURE)
    shutil.copyfile(out / RUN / FILE, out / FILE)
    text = json.dumps({"command": command, **dump(result)}, indent=1, ensure_ascii=False)
    part = out / f".{RESULT}.part"
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, out / RESULT)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, write and print the table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args, command = parsed(_parser(), argv)
    return guarded("ablation", lambda: _done(args, command))


def _done(args: argparse.Namespace, command: str) -> str:
    settings = AblationSettings(
        precision=args.precision,
        cpu=args.cpu,
        held_out_tokens=args.held_out_tokens,
        checkpoint_seconds=args.checkpoint_seconds,
        stop_after=args.stop_after,
    )
    result = ablate(
        args.source,
        args.output,
        load_variants(args.variants, _overrides(args)),
        data=args.data,
        held_out=args.held_out,
        layers=args.layers,
        settings=settings,
        force=args.force,
        progress=Told(),
        command=command,
    )
    if result is None:
        return f"stopped; the run is in {args.output / RUN}: the same command again goes on"
    return as_markdown(result, command)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = {f"transfer.{name}": getattr(args, name) for name in ("tokens", "length", "batch")}
    return {key: value for key, value in given.items() if value is not None} | dict(args.set)


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.distill.ablation", __doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the teacher")
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    add("--data", nargs="+", required=True, metavar="FILE", help="what to learn from")
    add("--held-out", nargs="+", type=Path, required=True, metavar="FILE", help="to measure on")
    add("--held-out-tokens", type=int, default=8192, metavar="N", help="of each (default: 8192)")
    add(
        "--variants", type=Path, metavar="FILE.toml", help="default: what LAWCAT's defaults rest on"
    )
    add("--tokens", type=int, metavar="N", help="that every variant learns from")
    add("--length", type=int, metavar="N", help="tokens of a row")
    add("--batch", type=int, metavar="N", help="rows of a step")
    add("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="of the base")
    add("--layers", type=numbers, metavar="1,6,12", help="learn these only; no perplexity then")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add("--checkpoint-seconds", type=float, default=120.0, metavar="N", help="default: 120")
    add(
        "--stop-after", type=float, metavar="SECONDS", help="then save and stop, to be gone on with"
    )
    add("--force", action="store_true", help="replace results, forget an unfinished run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
