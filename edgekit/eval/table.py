"""The command that makes a comparison table: the same tasks for a teacher and its students.

Example:
    python -m edgekit.eval.table --model teacher=smollm2-135m-instruct --model lawcat=lawcat \
        --text prose=held-out.txt --task perplexity,passkey,niah-1 --lengths 1024,4096 -o table

It writes `table/table.md`, `table/table.json` and everything that was measured; the same command
again goes on from there.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from edgekit.command import Told, guarded, module_parser, numbers, parsed
from edgekit.config import dump
from edgekit.data.needles import KINDS
from edgekit.errors import UsageError
from edgekit.eval.comparison import TEXT_TASKS, Comparison, compare
from edgekit.eval.report import as_markdown
from edgekit.eval.retrieval import RetrievalOptions
from edgekit.eval.windows import WindowOptions
from edgekit.utf8 import read_text

__all__ = ["main"]

TASKS = (*TEXT_TASKS, *KINDS)
NAME = re.compile(r"\w[\w.-]*")  # it becomes a folder


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print the table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args, command = parsed(_parser(), argv)
    return guarded("table", lambda: _made(args, command).rstrip("\n"))


def _made(args: argparse.Namespace, command: str) -> str:
    comparison = _comparison(args)
    measured = compare(comparison, args.output, Told())
    text = as_markdown(comparison, measured, command)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    data = {"command": command, "models": dump(measured)}
    (args.output / "table.json").write_text(
        json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return text


def _comparison(args: argparse.Namespace) -> Comparison:
    return Comparison(
        models=_pairs(args.model, "model"),
        text_tasks=tuple(task for task in args.task if task in TEXT_TASKS),
        texts={name: read_text(Path(file)) for name, file in _pairs(args.text, "text").items()},
        windows=WindowOptions(window=args.window, max_tokens=args.max_tokens),
        needles=tuple(
            RetrievalOptions(
                task=task,
                lengths=args.lengths,
                samples=args.samples,
                depths=args.depths,
                max_new_tokens=args.max_new_tokens,
                seed=args.seed,
                batch=args.batch,
                give_up=args.give_up,
            )
            for task in args.task
            if task in KINDS
        ),
        haystack=None if args.haystack is None else read_text(args.haystack),
        teacher=args.teacher,
        engine=args.engine,
        device=args.device,
        threads=args.threads,
    )


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.eval.table", __doc__)
    add = parser.add_argument
    add("--model", action="append", required=True, metavar="NAME=SPEC", help="once per row")
    add("--task", type=_tasks, required=True, metavar="TASK,TASK", help=", ".join(TASKS))
    add("--text", action="append", default=[], metavar="NAME=FILE", help="once per text")
    add("--teacher", metavar="SPEC", help="of agreement")
    add("--window", type=int, default=1024, metavar="N")
    add("--max-tokens", type=int, metavar="N", help="of each text")
    add("--lengths", type=numbers, default=(1024,), metavar="N,N")
    add("--samples", type=numbers, default=(100,), metavar="N,N", help="of each length, or all")
    add("--depths", type=int, default=10, metavar="N")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer")
    add("--haystack", type=Path, metavar="FILE", help="essay of niah-2 and niah-3")
    add("--seed", type=int, default=0, metavar="N")
    add("--batch", type=int, metavar="N", help="prompts side by side")
    add("--give-up", type=int, metavar="N", help="leave a length whose first N are all wrong")
    add("--engine", choices=("openvino", "onnx"), help="of every bundle")
    add("--device", help="of every model")
    add("--threads", type=int, metavar="N")
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    return parser


def _tasks(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    unknown = [task for task in found if task not in TASKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} given; allowed: {', '.join(TASKS)}")
    return found


def _pairs(given: Sequence[str], what: str) -> dict[str, str]:
    """Names and what they stand for, each name once."""
    found: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (equals and value and NAME.fullmatch(name)) or name in found:
            raise UsageError(
                f"{what} {pair!r} given; allowed: NAME=VALUE, each name once, of letters, digits, "
                "dots and hyphens"
            )
        found[name] = value
    return found


if __name__ == "__main__":
    sys.exit(main())
