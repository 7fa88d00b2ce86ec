"""The command that compares adapters: AFLoRA, LoRA and VeRA at equal steps, rates tuned first.

Example:
    python -m edgekit.adapters.tune.table smollm2-135m-instruct -o comparison

It fetches two tasks (`edgekit.data.tuning_tasks`), tries three rates for each method on held-out
examples, tunes with three seeds, scores on the test part, and writes table.md, table.json and
table.png. What is done stays done: the same command goes on where it was.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from edgekit.adapters.tune.benchmark import RATES, Benchmark, measure
from edgekit.adapters.tune.model import open_base
from edgekit.adapters.tune.recipe import METHODS
from edgekit.adapters.tune.report import as_markdown, draw_table, rows_of
from edgekit.command import Told, guarded, module_parser, numbers, parsed, setting
from edgekit.config import dump
from edgekit.data.tuning_tasks import TASKS, build_tasks
from edgekit.models.precision import choose_precision

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, measure, write and print the table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args, command = parsed(_parser(), argv)
    return guarded("table", lambda: _made(args, command).rstrip("\n"))


def _made(args: argparse.Namespace, command: str) -> str:
    benchmark = _benchmark(args)
    name = open_base(benchmark.source, benchmark.student).name
    args.output.mkdir(parents=True, exist_ok=True)
    data = args.tasks
    if data is None:
        data = args.output / "data"
        if not data.is_dir():
            build_tasks(data, args.archives)
    measured = measure(benchmark, data, args.output, Told())
    text = as_markdown(benchmark, measured, command, name)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    rows = {task: dump(rows_of(records)) for task, records in measured.items()}
    whole = {"command": command, "model": name, "rows": rows, "records": measured}
    (args.output / "table.json").write_text(
        json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    draw_table(measured, args.output / "table.png")
    return text


def _benchmark(args: argparse.Namespace) -> Benchmark:
    return Benchmark(
        source=args.source,
        student=args.student,
        tasks=args.task,
        methods=args.method,
        seeds=args.seeds,
        rates={**RATES, **dict(args.rates)},
        steps=args.steps,
        search_steps=args.search_steps,
        batch=args.batch,
        micro_batch=args.micro_batch or args.batch,
        validation=args.validation,
        test=args.test,
        overrides=dict(args.set),
        precision=choose_precision(args.precision, cpu=args.cpu),
        cpu=args.cpu,
    )


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.adapters.tune.table", __doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a model as for `edgekit tune`, or a student")
    add("--student", metavar="NAME|DIR", help="tune this student of SOURCE")
    add("--task", type=_words, default=TASKS, metavar="TASK,TASK", help=", ".join(TASKS))
    add("--method", type=_words, default=METHODS, metavar="NAME,NAME", help=", ".join(METHODS))
    add("--seeds", type=numbers, default=(0, 1, 2), metavar="N,N,N", help="default: 0,1,2")
    add(
        "--rates",
        type=_rates,
        action="append",
        default=[],
        metavar="METHOD=LR,LR,LR",
        help="to try instead of the usual ones",
    )
    add("--steps", type=int, default=200, metavar="N", help="of every training (default: 200)")
    add("--search-steps", type=int, default=50, metavar="N", help="of every trial (default: 50)")
    add("--batch", type=int, default=16, metavar="N", help="examples per step (default: 16)")
    add("--micro-batch", type=int, metavar="N", help="examples per forward pass")
    add("--validation", type=int, default=200, metavar="N", help="examples (default: 200)")
    add("--test", type=int, default=500, metavar="N", help="examples (default: 500)")
    add(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of every recipe",
    )
    add("--tasks", type=Path, metavar="DIR", help="the tasks, if they were fetched before")
    add("--from", dest="archives", type=Path, metavar="DIR", help="folder with their archives")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _rates(text: str) -> tuple[str, tuple[float, ...]]:
    method, _, rates = text.partition("=")
    try:
        found = tuple(float(rate) for rate in rates.split(","))
    except ValueError:
        found = ()
    if method not in METHODS or not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; allowed: METHOD=LR,LR,LR, such as lora=1e-4,3e-4,1e-3"
        )
    return method, found


if __name__ == "__main__":
    sys.exit(main())
