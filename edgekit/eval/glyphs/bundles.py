"""The glyph world's models as bundles: the captions of PyTorch, token for token, with SPIN too?

Example:
    python -m edgekit.eval.glyphs.bundles glyphs -o glyph-bundles

`glyphs` is what `python -m edgekit.eval.glyphs` wrote. Each seed's model is converted as it is and
with every SPIN setting that its results.json chose, and the test scenes are captioned in PyTorch
and on both engines. It writes `seed-N/METHOD`, a bundle each, `bundles.md` and `bundles.json`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.command import Told, guarded, module_parser, numbers, parsed
from edgekit.config import dump, load
from edgekit.errors import UsageError
from edgekit.eval.glyphs.checkpoint import completed
from edgekit.eval.glyphs.deployed import TORCH, Place, deployed
from edgekit.eval.glyphs.experiment import TEST, Scenes
from edgekit.eval.glyphs.methods import Method
from edgekit.eval.glyphs.model import MODEL, load_model
from edgekit.markdown import markdown_table
from edgekit.models.spin import SpinConfig
from edgekit.sources.base import read_json
from edgekit.targets.schema import ENGINES, WEIGHTS

__all__ = ["main", "seeds_in"]

Progress = Callable[[str, int, int], None]
METHODS = ("baseline", "mass", "logit")  # of results.json, which a bundle can have
HEADERS = ("seed", "method", "where", "captions equal", "C_I", "F1", "tokens/s", "of baseline")
NOTE = (
    "Equal captions are PyTorch's, token for token; a gap is how far apart PyTorch's own logits of "
    "two tokens are where a caption first differs. Tokens/s of decoding, and their ratio to the "
    "baseline's on the same scene: median (middle half) over the scenes, the bundles in turns."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, caption and print the table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args, command = parsed(_parser(), argv)
    return guarded("bundles", lambda: _made(args, command))


def _made(args: argparse.Namespace, command: str) -> str:
    if args.scenes is not None and args.scenes < 1:
        raise UsageError(f"scenes {args.scenes} given; allowed: 1 or more")
    told = Told()
    places = [
        place
        for seed in args.seeds or seeds_in(args.folder)
        for place in _of_seed(seed, args, told)
    ]
    rows = [_row(place) for place in places]
    text = f"{markdown_table(rows, HEADERS)}\n\n{NOTE}\n\nMade by:\n\n    {command}\n"
    (args.output / "bundles.md").write_text(text, encoding="utf-8")
    record = json.dumps({"command": command, "places": dump(places)}, indent=1)
    (args.output / "bundles.json").write_text(record + "\n", encoding="utf-8")
    return text.rstrip("\n")


def seeds_in(folder: Path) -> list[int]:
    """The seeds that an experiment's folder has results of, rising.

    Raises:
        UsageError: if there are none.
    """
    names = [file.parent.name.removeprefix("seed-") for file in folder.glob("seed-*/results.json")]
    found = [name for name in names if name.isdecimal()]
    if not found:
        raise UsageError(f"{folder}: nothing measured in it; run edgekit.eval.glyphs -o first")
    return sorted(int(seed) for seed in found)


def _of_seed(seed: int, args: argparse.Namespace, told: Progress) -> list[Place]:
    """Every method of one seed, in PyTorch and on every engine."""
    folder, out = args.folder / f"seed-{seed}", args.output / f"seed-{seed}"
    settings, methods = _measured(folder / "results.json")
    checkpoint = completed(folder, settings["mixer"])
    bundles = {name: out / name for name in methods}
    for number, (name, method) in enumerate(methods.items()):
        told(f"seed {seed}: convert {name}", number, len(methods) + 1)
        _convert(checkpoint.source, bundles[name], checkpoint.student, method, args)
    told(f"seed {seed}: captions", len(methods), len(methods) + 1)
    scenes = Scenes.of(TEST, settings["scenes"])
    scenes = Scenes(scenes.pixels[: args.scenes], scenes.drawn[: args.scenes])
    model = load_model(folder / MODEL, settings["mixer"])
    return deployed(seed, model, methods, bundles, scenes, threads=args.threads)


def _measured(file: Path) -> tuple[Mapping[str, Any], dict[str, Method]]:
    """The settings of an experiment, and its methods that a bundle can have."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file; run edgekit.eval.glyphs -o for this seed first")
    found = read_json(file)
    methods = {}
    for name in (name for name in METHODS if name in found["methods"]):
        spin = found["methods"][name]["spin"]
        settings = None if spin is None else load(SpinConfig, spin, where=f"{file}: {name}")
        methods[name] = Method(spin=settings)
    return found["settings"], methods


def _convert(
    source: Path, out: Path, student: Path | None, method: Method, args: argparse.Namespace
) -> None:
    from edgekit import convert  # slow to load

    convert(
        source,
        out,
        student=student,
        spin=method.spin,
        weights=args.weights,
        formats=ENGINES,
        target=args.target,
        verify=False,  # the captions do that, and a difference is to stand in the table
        force=True,
    )


def _row(place: Place) -> list[str]:
    return [
        str(place.seed),
        place.method,
        place.engine,
        "-" if place.engine == TORCH else _equal(place),
        f"{100 * place.figures.c_i:.1f}",
        f"{100 * place.figures.f1:.1f}",
        "-" if place.rate is None else place.rate.written(0),
        "-" if place.ratio is None else place.ratio.written(2),
    ]


def _equal(place: Place) -> str:
    count = place.figures.captions
    text = f"{count - len(place.differences)} of {count}"
    gaps = [difference.gap for difference in place.differences]
    return f"{text} (gaps up to {max(gaps):.1g})" if gaps else text


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.eval.glyphs.bundles", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER")
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    add("--seeds", type=numbers, metavar="N,N", help="default: all in FOLDER")
    add("--weights", choices=WEIGHTS, default="fp32")
    add("--target", default="auto", help="device profile, as for edgekit convert")
    add("--scenes", type=int, metavar="N", help="the first N of the test scenes (default: all)")
    add("--threads", type=int, default=1, metavar="N", help="of an engine (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
