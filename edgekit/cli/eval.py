"""Measure what a bundle, a student or a source is worth, on text and on needles in long texts.

  perplexity        how well it predicts --text; bits per byte too
  agreement         how far it says what --teacher says on --text: KL, first tokens, flips
  passkey, niah-N   whether it finds a needle in texts of --lengths, by generating the answer
  chair             how many objects it names that are not in the --pictures that it describes
  pope              whether it says yes to objects that are not in the --pictures

Text is read in windows without overlap (or --stride apart), each from an empty state. Needle and
picture tasks write every sample beside -o FILE, to FILE with the ending .samples.jsonl: the same
command again goes on from there.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.bundle import MANIFEST
from edgekit.cli.arguments import add_engine, add_json, natural, positive
from edgekit.cli.extras import extra
from edgekit.cli.output import as_json, as_table, write_text
from edgekit.command import numbers
from edgekit.config import dump
from edgekit.errors import UsageError
from edgekit.utf8 import read_text

if TYPE_CHECKING:
    from edgekit.eval.cells import Cell
    from edgekit.eval.reader import Logits, Reader
    from edgekit.eval.retrieval import Retrieval
    from edgekit.eval.windows import WindowOptions

__all__ = ["HELP", "add_arguments", "run"]

HELP = "measure quality: perplexity, agreement with a teacher, retrieval from long texts"
NEEDLES = ("passkey", "niah-1", "niah-2", "niah-3")  # numpy is too slow to load for --help
PICTURES = ("chair", "pope")
TASKS = ("perplexity", "agreement", *NEEDLES, *PICTURES)
SPLITS = ("random", "popular", "adversarial")
HEADERS = ("length", "samples", "right", "share", "95% interval", "s/sample", "")
JOURNAL = ".samples.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("model", metavar="BUNDLE|STUDENT|SOURCE")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument(
        "--base", metavar="SOURCE", help="a student's teacher, if not found by name"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the JSON there too"
    )
    add_engine(parser)
    add_json(parser)
    _add_text_arguments(parser.add_argument_group("perplexity and agreement"))
    _add_needle_arguments(parser.add_argument_group("passkey and niah"))
    _add_picture_arguments(parser.add_argument_group("chair and pope"))


def _add_text_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="read in this order")
    group.add_argument("--teacher", metavar="BUNDLE|SOURCE", help="of agreement")
    group.add_argument("--window", type=positive, default=1024, metavar="N", help="in tokens")
    group.add_argument("--stride", type=positive, metavar="N", help="default: the window")
    group.add_argument("--max-tokens", type=positive, metavar="N", help="default: the whole text")


def _add_needle_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--lengths", type=numbers, default=(1024,), metavar="N,N", help="in tokens (default: 1024)"
    )
    group.add_argument(
        "--samples",
        type=numbers,
        default=(100,),
        metavar="N,N",
        help="of each length, or one number for all (default: 100)",
    )
    group.add_argument(
        "--depths", type=natural, default=10, metavar="N", help="spread evenly (default: 10)"
    )
    group.add_argument("--haystack", type=Path, metavar="FILE", help="essay of niah-2 and niah-3")
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="of an answer (passkey, pope: 16, niah: 128, chair: 512)",
    )
    group.add_argument("--batch", type=positive, metavar="N", help="prompts side by side")
    group.add_argument(
        "--give-up", type=positive, metavar="N", help="leave a length whose first N are all wrong"
    )
    group.add_argument("--seed", type=natural, default=0, metavar="N")
    group.add_argument("--plot", type=Path, metavar="PNG", help="draw length by depth")


def _add_picture_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--pictures",
        type=Path,
        metavar="FILE.jsonl",
        help='one {"image": ..., "objects": [...]} per line; for pope without --split, one '
        '{"image": ..., "text": ..., "label": "yes" or "no"}',
    )
    group.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="chair: an object and its synonyms per line"
    )
    group.add_argument("--question", metavar="TEXT", help="chair: what is asked of each picture")
    group.add_argument(
        "--split", choices=SPLITS, help="pope: ask for objects that are there and such that are not"
    )
    group.add_argument(
        "--spin", metavar="FILE|PRESET", help="of a source in PyTorch; a bundle has its own"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    for path in (args.output, args.plot):  # before hours of measuring
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    kind = _retrieval if args.task in NEEDLES else _seen if args.task in PICTURES else _on_text
    row, table = kind(args)
    if args.output is not None:
        write_text(as_json(row), args.output)
    print(as_json(row) if args.json else table)
    return 0


def _on_text(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Perplexity or agreement: the JSON and the table."""
    from edgekit.eval.windows import WindowOptions

    _check_flags(args)
    options = WindowOptions(window=args.window, stride=args.stride, max_tokens=args.max_tokens)
    text = "".join(read_text(path) for path in args.text)
    row = {"model": args.model, "task": args.task, **_measured_on(text, options, args)}
    row |= {"window": options.window, "stride": options.step}
    return row, as_table((key, _short(value)) for key, value in row.items())


def _check_flags(args: argparse.Namespace) -> None:
    if not args.text:
        raise UsageError(f"task {args.task} reads a text; give it with --text FILE")
    if (args.task == "agreement") != (args.teacher is not None):
        raise UsageError("--teacher is for agreement, which needs it: give both or neither")
    if args.plot is not None:
        raise UsageError(f"--plot given for {args.task}; allowed: with {', '.join(NEEDLES)}")


def _measured_on(text: str, options: "WindowOptions", args: argparse.Namespace) -> dict[str, Any]:
    from edgekit.cli.progress import Progress
    from edgekit.eval.agreement import agreement
    from edgekit.eval.perplexity import perplexity

    reader = _open(args.model, "all", args)
    with Progress() as progress:
        if args.task == "perplexity":
            return dict(dump(perplexity(reader, text, options, progress.step)))
        teacher = _open(args.teacher, "all", args)
        return dict(dump(agreement(reader, teacher, text, options, progress.step)))


def _retrieval(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """A needle task: the JSON and the table; draws the picture if asked to."""
    from edgekit.cli.progress import Progress
    from edgekit.eval.retrieval import RetrievalOptions, retrieval

    options = RetrievalOptions(
        task=args.task,
        lengths=args.lengths,
        samples=args.samples,
        depths=args.depths,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        batch=args.batch,
        give_up=args.give_up,
    )
    haystack = None if args.haystack is None else read_text(args.haystack)
    if args.plot is not None:
        with extra("train"):
            from edgekit.eval.heatmap import draw_heatmap
    with Progress() as progress:
        result = retrieval(
            _open(args.model, "last", args),
            options,
            haystack=haystack,
            journal=None if args.output is None else args.output.with_suffix(JOURNAL),
            progress=progress.step,
        )
    if args.plot is not None:
        draw_heatmap(result, args.plot)
    return dict(dump(result)), _cells_table(result)


def _seen(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """CHAIR or POPE: the JSON and the table."""
    from edgekit.cli.progress import Progress
    from edgekit.eval.describing import open_describer

    if args.pictures is None:
        raise UsageError(f"task {args.task} needs pictures; give them with --pictures FILE.jsonl")
    if args.plot is not None:
        raise UsageError(f"--plot given for {args.task}; allowed: with {', '.join(NEEDLES)}")
    measure = _chair if args.task == "chair" else _pope
    options: dict[str, Any] = {
        "journal": None if args.output is None else args.output.with_suffix(JOURNAL)
    }
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    ready = measure(args)
    with extra("convert"):
        model = open_describer(
            args.model,
            engine=args.engine,
            device=args.device,
            threads=args.threads,
            spin=args.spin,
        )
    with Progress() as progress:
        row = dict(dump(ready(model, progress=progress.step, **options)))
    figures = {key: _short(value) for key, value in row["figures"].items()}
    head = {key: row[key] for key in ("model", "task", "engine", "device")}
    return row, as_table({**head, **figures}.items())


def _chair(args: argparse.Namespace) -> Callable[..., Any]:
    """What is left to do with an opened model; whatever can be refused is refused before."""
    from edgekit.eval.describing import DESCRIBE, chair_of
    from edgekit.eval.objects import read_vocabulary
    from edgekit.eval.pictures import read_pictures

    if args.vocabulary is None:
        raise UsageError("task chair needs to know objects; give them with --vocabulary FILE")
    if args.split is not None:
        raise UsageError("--split given for chair; allowed: with pope")
    pictures, vocabulary = read_pictures(args.pictures), read_vocabulary(args.vocabulary)
    question = args.question or DESCRIBE
    return lambda model, **options: chair_of(
        model, pictures, vocabulary, question=question, **options
    )


def _pope(args: argparse.Namespace) -> Callable[..., Any]:
    from edgekit.eval.describing import pope_of
    from edgekit.eval.pictures import read_pictures, read_questions, split

    if args.vocabulary is not None or args.question is not None:
        raise UsageError("--vocabulary or --question given for pope; allowed: with chair")
    if args.split is None:
        questions = read_questions(args.pictures)
    else:
        questions = split(read_pictures(args.pictures), args.split, seed=args.seed)
    return lambda model, **options: pope_of(model, questions, **options)


def _open(spec: str, logits: "Logits", args: argparse.Namespace) -> "Reader":
    """Open the model or its teacher; the flags of engine and student are for what they fit."""
    from edgekit.eval.reader import open_reader

    bundle = (Path(spec) / MANIFEST).is_file()
    model = spec == args.model
    with extra("convert"):
        return open_reader(
            spec,
            logits=logits,
            engine=args.engine if model or bundle else None,
            device=args.device if model else None,
            threads=args.threads,
            base=args.base if model else None,
        )


def _cells_table(result: "Retrieval") -> str:
    table = as_table([_cells_row(cell) for cell in result.cells], HEADERS)
    return "\n".join([table, "", *_footer(result)])


def _cells_row(cell: "Cell") -> tuple[object, ...]:
    if cell.accuracy is None or cell.interval is None:
        return (cell.length, 0, "-", "-", "-", "-", cell.refused)
    low, high = cell.interval
    share, interval = f"{cell.accuracy:.1%}", f"{low:.1%} to {high:.1%}"
    seconds = f"{cell.seconds / cell.samples:.2f}"
    return (cell.length, cell.samples, cell.correct, share, interval, seconds, "")


def _footer(result: "Retrieval") -> Iterable[str]:
    yield from result.notes
    machine, settings = result.machine, result.settings
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    yield (
        f"{result.task}, {result.model} on {settings['engine']} {machine.device}: "
        f"greedy, at most {settings['max_new_tokens']} new tokens, {settings['depths']} depths, "
        f"seed {settings['seed']}; {machine.cpu}, {machine.cpu_count} CPUs; {versions}"
    )


def _short(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return " to ".join(f"{item:.4f}" for item in value)
    if isinstance(value, dict):  # a mean with its interval
        spread = "" if value["interval"] is None else f" ({_short(value['interval'])})"
        return f"{_short(value['value'])}{spread}"
    return "-" if value is None else value
