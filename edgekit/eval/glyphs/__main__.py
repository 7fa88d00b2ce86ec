"""Train the glyph world's models and measure SPIN on them.

Example:
    python -m edgekit.eval.glyphs -o glyphs --seeds 0,1,2

For each seed it writes `seed-N/model`, a LLaVA that transformers opens and `edgekit convert` reads,
and `seed-N/results.json`; then `table.md`. With `--mixer lawcat` the model is the tensors of one
with edgekit's own decoder, and what `edgekit convert` reads is `seed-N/base`, a LLaVA, with its
`--student seed-N/student`. What is there already is not made again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from edgekit.command import Told, guarded, module_parser, numbers
from edgekit.config import dump
from edgekit.errors import UsageError
from edgekit.eval.glyphs.checkpoint import completed, made
from edgekit.eval.glyphs.experiment import measured
from edgekit.eval.glyphs.model import MODEL, Mixer, Model, Training, load_model, new_model, train
from edgekit.eval.glyphs.report import HEADERS, figures_row, kept_methods
from edgekit.markdown import markdown_table

__all__ = ["main"]

SMOKE = Training(text_steps=20, picture_steps=40, batch=16)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and print the table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args = _parser().parse_args(argv)
    return guarded("glyphs", lambda: _made(args))


def _made(args: argparse.Namespace) -> str:
    if args.scenes < 1:
        raise UsageError(f"scenes {args.scenes} given; allowed: 1 or more")
    training, told = SMOKE if args.smoke else Training(), Told()
    results = {
        seed: _results(args.output / f"seed-{seed}", replace(training, seed=seed), args, told)
        for seed in args.seeds
    }
    table = _table(results, args.mixer)
    (args.output / "table.md").write_text(table, encoding="utf-8")
    return table


def _results(folder: Path, training: Training, args: argparse.Namespace, told: Told) -> Any:
    """The figures of one seed, made or read."""
    settings = {"mixer": args.mixer, **dump(training), "scenes": args.scenes}

    def measure() -> Any:
        model = _model(folder, training, args.mixer, told)
        return measured(model, seed=training.seed, scenes=args.scenes, progress=told)

    methods = kept_methods(folder / "results.json", settings, measure)
    if (folder / MODEL).is_dir():
        completed(folder, args.mixer)
    return methods


def _model(folder: Path, training: Training, mixer: Mixer, told: Told) -> Model:
    def trained(work: Path) -> None:
        model = new_model(training.seed, mixer)
        train(model, training, told)
        model.save_pretrained(work)

    made(folder / MODEL, trained)
    completed(folder, mixer)
    return load_model(folder / MODEL, mixer)


def _table(results: dict[int, Any], mixer: Mixer) -> str:
    """All methods over all seeds, means and each seed's figures."""
    names = next(iter(results.values()))
    rows = [[name, *figures_row([m[name] for m in results.values()])] for name in names]
    title = f"Glyph world, {mixer}, seeds {', '.join(map(str, results))}: mean (each seed)"
    table = markdown_table(rows, ("method", *HEADERS))
    return f"{title}\n\n{table}\n"


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.eval.glyphs", __doc__)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    add("--mixer", choices=get_args(Mixer), default="softmax", help="of the decoder's layers")
    add("--seeds", type=numbers, default=(0, 1, 2), metavar="N,N")
    add("--scenes", type=int, default=250, metavar="N", help="to choose on, and to measure on")
    add("--smoke", action="store_true", help="60 steps: whether it runs, not what it finds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
