"""SPIN on a workstation: find settings for a vision-language model, or fold chosen heads into it.

edgekit spin calibrate SOURCE -o DIR --pictures FILE.jsonl --vocabulary FILE
edgekit spin apply SOURCE DIR -o MODEL
edgekit spin presets

`calibrate` writes DIR/spin.toml for `edgekit convert --spin`, DIR/calibration.json and the picture
DIR/heads.png; the same command again goes on from there. `apply` multiplies the heads that look
least at pictures on average into the weights of a plain model: no cost and no input at run time,
but for every token, and only where the calibration found that to be better than the plain model.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.cli.arguments import add_json, natural, positive
from edgekit.cli.extras import extra
from edgekit.cli.output import as_json, as_table
from edgekit.command import floats, numbers
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.eval.calibration import Calibration
    from edgekit.eval.chair import Chair

__all__ = ["HELP", "add_arguments", "run"]

HELP = "turn down heads that do not look at the picture: find settings, fold them in"
HEADERS = ("", "C_I", "C_S", "recall", "F1", "objects", "words")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs below this one and their flags."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="action", required=True)
    calibrate = verbs.add_parser(
        "calibrate", help="find settings on annotated pictures", allow_abbrev=False
    )
    add = calibrate.add_argument
    add("source", metavar="SOURCE")
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    add(
        "--pictures",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='one {"image": ..., "objects": [...]} per line',
    )
    add(
        "--vocabulary",
        type=Path,
        required=True,
        metavar="FILE",
        help="an object and its synonyms per line",
    )
    add("--question", metavar="TEXT", help="what is asked of each picture")
    add("--suppress", type=numbers, default=(1, 2), metavar="N,N", help="heads (default: 1,2)")
    add(
        "--alpha",
        type=_floats,
        default=(0.0, 0.08, 0.5),
        metavar="A,A",
        help="factors of a suppressed head (default: 0,0.08,0.5)",
    )
    add(
        "--layers",
        type=_span,
        action="append",
        metavar="FIRST,END",
        help="a range to try, END left out; repeatable (default: all, and the first half)",
    )
    add("--score", choices=("mass", "logit"), default="mass", help="what heads are ranked by")
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="of a description")
    add("--seed", type=natural, default=0, metavar="N", help="of the two halves of the pictures")
    add_json(calibrate)
    calibrate.set_defaults(action=_calibrate)
    apply = verbs.add_parser(
        "apply", help="a model with the calibrated heads folded into it", allow_abbrev=False
    )
    apply.add_argument("source", metavar="SOURCE")
    apply.add_argument("calibration", type=Path, metavar="DIR", help="of calibrate")
    apply.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL")
    apply.add_argument("--force", action="store_true", help="replace an existing model")
    apply.add_argument(
        "--unvalidated", action="store_true", help="even if it was not better on the pictures"
    )
    add_json(apply)
    apply.set_defaults(action=_apply)
    presets = verbs.add_parser("presets", help="the published settings", allow_abbrev=False)
    add_json(presets)
    presets.set_defaults(action=_presets)


def run(args: argparse.Namespace) -> int:
    """Do what the verb says; returns the exit code."""
    with extra("convert"):
        text: str = args.action(args)
    print(text)
    return 0


def _calibrate(args: argparse.Namespace) -> str:
    from edgekit.cli.progress import Progress
    from edgekit.eval.calibration import CalibrationOptions, calibrate
    from edgekit.eval.calibration_files import write_calibration
    from edgekit.eval.describing import DESCRIBE
    from edgekit.eval.objects import read_vocabulary
    from edgekit.eval.pictures import read_pictures
    from edgekit.sources import open_source
    from edgekit.sources.picture_model import open_picture_model

    pictures, vocabulary = read_pictures(args.pictures), read_vocabulary(args.vocabulary)
    options = CalibrationOptions(
        suppress=args.suppress,
        alpha=args.alpha,
        layers=None if args.layers is None else tuple(args.layers),
        score=args.score,
        question=args.question or DESCRIBE,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    model = open_picture_model(open_source(args.source))
    args.output.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        found = calibrate(
            model, pictures, vocabulary, options, folder=args.output, progress=progress.step
        )
    write_calibration(found, args.output)
    return as_json(found) if args.json else _found(found)


def _found(found: "Calibration") -> str:
    trials = [_row("plain" if t.spin is None else _named(t.spin), t.figures) for t in found.trials]
    if found.static is not None:
        trials.append(_row("static heads of the suggestion", found.static))
    judged = [_row(name, figures) for name, figures in found.test.items()]
    if found.spin is None:
        said = "No candidate names fewer absent objects and keeps F1: leave SPIN out."
    else:
        said = f"Suggested: {_named(found.spin)}" + (
            "; its static form holds too." if found.static_holds else "; its static form does not."
        )
    other = found.pictures - found.validation
    return "\n\n".join(
        [
            as_table(trials, (f"chosen on {found.validation}", *HEADERS[1:])),
            as_table(judged, (f"judged on {other} others", *HEADERS[1:])),
            said,
        ]
    )


def _named(spin: object) -> str:
    from edgekit.models.spin import SpinConfig

    assert isinstance(spin, SpinConfig)
    first, end = spin.layers or (0, 0)
    return f"{spin.suppress} heads, alpha {spin.alpha}, layers {first} to {end}"


def _row(name: str, c: "Chair") -> tuple[str, ...]:
    shares = (c.c_i, c.c_s, c.recall, c.f1)
    return (name, *(f"{100 * share:.1f}" for share in shares), f"{c.objects:.2f}", f"{c.words:.1f}")


def _apply(args: argparse.Namespace) -> str:
    from edgekit.eval.calibration_files import read_calibration
    from edgekit.sources import open_source
    from edgekit.spin.folding import fold_into

    found = read_calibration(args.calibration)
    if found.spin is None:
        raise UsageError(f"{args.calibration}: suggests nothing, so there is nothing to apply")
    if not found.static_holds and not args.unvalidated:
        raise UsageError(
            f"{args.calibration}: heads chosen once and for all were not better than the plain "
            "model; convert with --spin instead, or give --unvalidated"
        )
    heads = {int(layer): chosen for layer, chosen in found.heads.items()}
    out = fold_into(
        open_source(args.source), heads, found.spin.alpha, args.output, force=args.force
    )
    count = sum(map(len, heads.values()))
    if args.json:
        return as_json({"out": str(out), "alpha": found.spin.alpha, "heads": heads})
    rows = [("model", str(out)), ("heads", f"{count} in {len(heads)} layers, times "
             f"{found.spin.alpha}")]  # fmt: skip
    return as_table(rows)


def _presets(args: argparse.Namespace) -> str:
    from edgekit.spin.presets import preset, preset_names

    found = {name: preset(name) for name in preset_names()}
    if args.json:
        return as_json(found)
    rows = [
        (name, str(s.keep if s.suppress is None else s.suppress), str(s.alpha), str(s.layers))
        for name, s in found.items()
    ]
    return as_table(rows, ("preset", "keep", "alpha", "layers"))


def _floats(text: str) -> tuple[float, ...]:
    return floats(text, "numbers, such as 0,0.08")


def _span(text: str) -> tuple[int, int]:
    found = numbers(text)
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} given; allowed: two numbers, such as 0,16")
    return found[0], found[1]
