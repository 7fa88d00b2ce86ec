"""Can SPIN be learnt? Students of the glyph world's models, taught with SPIN or run with it.

Example:
    python -m edgekit.eval.glyphs -o glyphs
    python -m edgekit.experiments.learnt_spin glyphs -o learnt

`glyphs` is what the first command wrote, with softmax layers. For each seed the SPIN settings that
its results.json chose for `mass` turn the teacher down while students learn from it; the others
learn from the teacher as it is. Settings of SPIN at run time over a LAWCAT student are chosen on
other scenes than it is measured on. It writes `seed-N.json` and `table.md`; what is there already
is not made again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.command import Told, guarded, module_parser, numbers, parsed
from edgekit.config import dump, load
from edgekit.errors import UsageError
from edgekit.eval.glyphs.bundles import seeds_in
from edgekit.eval.glyphs.experiment import TEST, VALIDATION, Scenes, chosen_settings
from edgekit.eval.glyphs.methods import Method, spun_captions
from edgekit.eval.glyphs.model import MODEL, Model, load_model
from edgekit.eval.glyphs.report import HEADERS, figures_row, kept_methods
from edgekit.experiments.spin_lessons import Distilling, distilled
from edgekit.markdown import markdown_table
from edgekit.models.spin import SpinConfig
from edgekit.sources.base import read_json

__all__ = ["main"]

SMOKE = Distilling(transfer_steps=3, tuning_steps=3, batch=8)
Row = tuple[str, str]  # the model, and where its SPIN is


def main(argv: Sequence[str] | None = None) -> int:
    """Distil, measure and print the table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args, command = parsed(_parser(), argv)
    return guarded("learnt_spin", lambda: _made(args, command))


def _made(args: argparse.Namespace, command: str) -> str:
    settings, told = SMOKE if args.smoke else Distilling(), Told()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = args.seeds or seeds_in(args.folder)
    found = [_seed(args, seed, replace(settings, seed=seed), told) for seed in seeds]
    rows = [
        [figures[0]["model"], figures[0]["where"], *figures_row(figures)]
        for figures in zip(*found, strict=True)
    ]
    title = f"Glyph world, distilled, seeds {', '.join(map(str, seeds))}: mean (each seed)"
    table = markdown_table(rows, ("model", "SPIN", *HEADERS))
    text = f"{title}\n\n{table}\n\nMade by:\n\n    {command}\n"
    (args.output / "table.md").write_text(text, encoding="utf-8")
    return text.rstrip("\n")


def _seed(
    args: argparse.Namespace, seed: int, settings: Distilling, told: Told
) -> list[dict[str, Any]]:
    """The figures of one seed, made or read."""
    teacher = args.folder / f"seed-{seed}"
    experiment = read_json(teacher / "results.json")
    if experiment["settings"]["mixer"] != "softmax":
        raise UsageError(f"{teacher} has layers of lawcat; a teacher's are softmax")
    given = {"distilling": dump(settings), "teacher": experiment["settings"]}
    spin = load(SpinConfig, experiment["methods"]["mass"]["spin"], where=str(teacher))
    scenes = experiment["settings"]["scenes"]

    def measure() -> list[dict[str, Any]]:
        return _measured(load_model(teacher / MODEL, "softmax"), spin, settings, scenes, told)

    methods: list[dict[str, Any]] = kept_methods(args.output / f"seed-{seed}.json", given, measure)
    return methods


def _measured(
    teacher: Model, spin: SpinConfig, settings: Distilling, scenes: int, told: Told
) -> list[dict[str, Any]]:
    """{teacher, LAWCAT} x {no SPIN, SPIN at run time, SPIN learnt}."""
    validation, test = Scenes.of(VALIDATION, scenes), Scenes.of(TEST, scenes)
    plain = distilled(teacher, "lawcat", None, settings, told)
    baseline = validation.score(spun_captions(plain, validation.pixels, Method()))
    rows: list[tuple[Row, Model, SpinConfig | None]] = [
        (("softmax", "none"), teacher, None),
        (("softmax", "at run time"), teacher, spin),
        (("softmax", "learnt"), distilled(teacher, "softmax", spin, settings, told), None),
        (("LAWCAT", "none"), plain, None),
        (
            ("LAWCAT", "at run time"),
            plain,
            chosen_settings(plain, validation, baseline, "mass", told),
        ),
        (("LAWCAT", "learnt"), distilled(teacher, "lawcat", spin, settings, told), None),
    ]
    return [
        {
            "model": name,
            "where": where,
            "spin": None if method is None else dump(method),
            **dump(test.score(spun_captions(model, test.pixels, Method(spin=method)))),
        }
        for (name, where), model, method in rows
    ]


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.experiments.learnt_spin", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="GLYPHS", help="what edgekit.eval.glyphs wrote")
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    add("--seeds", type=numbers, metavar="N,N", help="default: all of them")
    add("--smoke", action="store_true", help="a few steps: whether it runs, not what it finds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
