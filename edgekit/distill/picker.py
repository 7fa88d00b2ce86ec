"""Which layers of a student to keep as softmax: measured, ranked, ready for the next distillation.

Example:
    python -m edgekit.distill.picker student --text held-out.txt --keep 4 --greedy

Each layer in turn is given the teacher's attention back; the ones that bring the student closest to
its teacher (mean KL per token on the text) are worth most. The last line is the flag to use next.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgekit.command import Told, guarded, module_parser
from edgekit.config import dump
from edgekit.distill.layer_choice import Choice, Restored, pick_layers
from edgekit.distill.processes import Processes
from edgekit.distill.texts import read_rows
from edgekit.errors import UsageError
from edgekit.models.decoder import Decoder
from edgekit.models.precision import choose_precision
from edgekit.runtime.text import Tokenizer
from edgekit.sources.student import open_model

__all__ = ["main"]

HEADERS = ("layer", "KL without", "KL with", "gain")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print or write the choice.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args = _parser().parse_args(argv)
    return guarded("picker", lambda: _done(args))


def _done(args: argparse.Namespace) -> str:
    for path in (args.output, args.plot):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    choice = _choice(args)
    text = json.dumps(dump(choice), indent=1)
    if args.output is not None:
        part = args.output.with_name(f".{args.output.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, args.output)
    if args.plot is not None:
        from edgekit.distill.choice_plot import draw_choice

        draw_choice(choice, args.plot)
    return text if args.json else _table(choice)


def _choice(args: argparse.Namespace) -> Choice:
    source, config, store = open_model(args.student, base=args.base)
    if set(config.mixers) == {"softmax"}:
        raise UsageError(f"{args.student}: every layer is softmax; give a student to choose from")
    processes = Processes(choose_precision(args.precision, cpu=args.cpu), cpu=args.cpu)
    if processes.count > 1:
        raise UsageError(f"{processes.count} processes started; allowed: the picker runs in one")
    tokenizer = Tokenizer(source.directory)
    rows = read_rows(args.text, tokenizer, length=args.length, tokens=args.tokens)
    teacher, student = (
        Decoder.from_store(*model).to(processes.device)
        for model in ((source.config, source.weights), (config, store))
    )
    return pick_layers(
        teacher,
        student,
        rows.to(processes.device),
        processes.autocast,
        keep=args.keep,
        greedy=args.greedy,
        progress=Told(),
    )


def _table(choice: Choice) -> str:
    """The ranking, the choice, and the flag to use next."""
    steps, before = [], choice.kl
    for step in choice.steps:
        steps.append(_cells(step, before))
        before = step.kl
    flag = ",".join(map(str, choice.softmax_layers))
    how = "each given those before it" if choice.greedy else "by the ranking"
    return "\n".join(
        (
            f"mean KL(teacher || student) per token, nats, on {choice.rows} rows of "
            f"{choice.length} tokens; ± is half of the 95 % interval over the rows",
            "",
            "each layer given its softmax attention back, alone:",
            _columns([_cells(restored, choice.kl) for restored in choice.ranking]),
            "",
            f"chosen, {how}, each measured beside those before it:",
            _columns(steps),
            "",
            f"--softmax-layers {flag}",
        )
    )


def _cells(restored: Restored, before: float) -> tuple[str, ...]:
    layer = str(restored.layer)
    return layer, f"{before:.4f}", f"{restored.kl:.4f}", f"{restored.gain:+.4f}"


def _columns(rows: Iterable[tuple[str, ...]]) -> str:
    lines = [HEADERS, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.distill.picker", __doc__)
    add = parser.add_argument
    add("student", metavar="STUDENT", help="a directory, or the name of one that ships")
    add("--text", type=Path, required=True, metavar="FILE", help="held-out text")
    add("--base", metavar="SOURCE", help="its teacher, if not found by name")
    add("--keep", type=int, default=4, metavar="N", help="layers to choose (default: 4)")
    add("--greedy", action="store_true", help="choose each given those before it (N times as long)")
    add("--tokens", type=int, default=4096, metavar="N", help="of the text (default: 4096)")
    add("--length", type=int, default=512, metavar="N", help="tokens of a row (default: 512)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add("-o", "--output", type=Path, metavar="FILE", help="write the JSON there")
    add("--plot", type=Path, metavar="PNG", help="draw what each layer is worth")
    add("--json", action="store_true", help="print the JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
