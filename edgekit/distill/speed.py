"""How many tokens a second distillation learns from, with one form of the kernels and another.

Example:
    python -m edgekit.distill.speed smollm2-135m-instruct --data text.txt -o speed
    python -m edgekit.distill.speed SOURCE --data text.txt -o speed --forms reference,torch --cpu \
        --set transfer.length=64 --set tuning.length=64     a rehearsal

Each form runs the same few steps of both stages, in turn, in a folder that is thrown away. The
figure of a stage is the median over its steps, the first ones left out: there programs are
compiled. It writes `speed.md` and `speed.json`.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from edgekit.command import Told, guarded, module_parser, parsed, setting
from edgekit.config import dump
from edgekit.distill.metrics import read_metrics
from edgekit.distill.recipe import Recipe, load_recipe
from edgekit.distill.run import Settings, distill
from edgekit.kernels.dispatch import Form, forced
from edgekit.markdown import markdown_table

__all__ = ["main"]

STEPS, SKIPPED = 12, 4
STAGES = {1: "transfer", 2: "tuning"}
HEADERS = ("stage", "kernels", "tokens/s", "10-90 %", "of the first")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print a table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args, command = parsed(_parser(), argv)
    return guarded("speed", lambda: _made(args, command).rstrip("\n"))


def _made(args: argparse.Namespace, command: str) -> str:
    plan = load_recipe(args.recipe, _short(args))
    speeds = {form: _speeds(args, plan, form) for form in args.forms}
    text = f"{_where(args)}\n\n{_table(speeds)}\n\nMade by:\n\n    {command}\n"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed.md").write_text(text, encoding="utf-8")
    data = {"command": command, "recipe": dump(plan), "tokens_per_second": speeds}
    (args.output / "speed.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return text


def _short(args: argparse.Namespace) -> dict[str, Any]:
    """What to change in the recipe, so that each stage has `STEPS` steps."""
    given = dict(args.set)
    plan = load_recipe(args.recipe, given)
    stages = {"transfer": plan.transfer, "tuning": plan.tuning}
    return given | {
        f"{name}.tokens": (STEPS - 1) * stage.batch * stage.length + 1
        for name, stage in stages.items()
    }


def _speeds(args: argparse.Namespace, plan: Recipe, form: Form) -> dict[str, list[float]]:
    """Tokens per second of each step that counts, by the name of its stage."""
    with tempfile.TemporaryDirectory() as folder, forced(form):
        student = Path(folder) / "student"
        settings = Settings(precision=args.precision, cpu=args.cpu)
        distill(args.source, student, plan, data=args.data, settings=settings, progress=Told())
        records = read_metrics(student)
    found: dict[str, list[float]] = {}
    for number, name in STAGES.items():
        steps = [r for r in records if r["stage"] == number and "seconds" in r][SKIPPED:]
        found[name] = [
            (after["tokens"] - before["tokens"]) / max(after["seconds"] - before["seconds"], 1e-9)
            for before, after in itertools.pairwise(steps)
        ]
    return found


def _where(args: argparse.Namespace) -> str:
    cuda = torch.cuda.is_available() and not args.cpu
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return f"{args.source} on {device}, torch {torch.__version__}, recipe `{args.recipe}`"


def _table(speeds: dict[Form, dict[str, list[float]]]) -> str:
    first = next(iter(speeds.values()))
    rows = []
    for stage, (form, found) in itertools.product(STAGES.values(), speeds.items()):
        steps, base = found[stage], first[stage]
        if not steps:  # a stage that the recipe leaves out
            continue
        cuts = statistics.quantiles(steps, n=10)
        middle = statistics.median(steps)
        ratio = f"{middle / statistics.median(base):.2f}"
        rows.append((stage, form, f"{middle:.0f}", f"{cuts[0]:.0f}-{cuts[-1]:.0f}", ratio))
    return markdown_table(rows, HEADERS)


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.distill.speed", __doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the teacher, as for `edgekit distill`")
    add("--data", nargs="+", required=True, metavar="FILE", help="text to learn from")
    add("--recipe", default="general", metavar="NAME", help="default: general")
    add("--set", type=setting, action="append", default=[], metavar="KEY=VALUE")
    add("--forms", type=_forms, default=("torch", "triton"), metavar="FORM,FORM")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    return parser


def _forms(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    unknown = [form for form in found if form not in get_args(Form)]
    if unknown:
        allowed = ", ".join(get_args(Form))
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} given; allowed: {allowed}")
    return found


if __name__ == "__main__":
    sys.exit(main())
