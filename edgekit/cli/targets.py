"""List the device profiles, or show one with the provenance of each setting.

With a bundle: which of them can serve it, or whether one can.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from edgekit import targets
from edgekit.bundle import Manifest, read_manifest
from edgekit.cli.arguments import add_json
from edgekit.cli.output import as_json, as_table
from edgekit.errors import UsageError
from edgekit.targets import Target

__all__ = ["HELP", "add_arguments", "run"]

HELP = "list device profiles, or show one"
MARKS = "* what `--target auto` takes here; + what this machine has too, to be asked for by name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="the target to show")
    parser.add_argument(
        "--bundle", type=Path, metavar="BUNDLE", help="say which targets can serve it"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the profiles; returns the exit code."""
    manifest = None if args.bundle is None else read_manifest(args.bundle)
    chosen = [targets.load(name) for name in ([args.name] if args.name else targets.names())]
    if args.name and manifest is not None:
        targets.check_serves(chosen[0], manifest, _memory(chosen[0]))
    if args.json:
        print(as_json(chosen[0] if args.name else chosen))
    elif args.name:
        print(_details(chosen[0]))
    else:
        print(_listing(chosen) if manifest is None else _serving(chosen, manifest))
    return 0


def _listing(known: Sequence[Target]) -> str:
    auto, *others = targets.found()
    marks = {auto: "*", **dict.fromkeys(others, "+")}
    rows = [(marks.get(t.name, ""), t.name, t.description) for t in known]
    return as_table(rows, ("", "target", "for")) + f"\n\n{MARKS}"


def _details(target: Target) -> str:
    shown = [f.name for f in dataclasses.fields(target) if f.name != "provenance"]
    rows = [
        (name, _plain(getattr(target, name)), target.provenance.get(name, "")) for name in shown
    ]
    return as_table(rows, ("setting", "value", "where it comes from"))


def _plain(value: object) -> str:
    """A setting as one cell."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "-"
    return "-" if value is None else str(value)


def _serving(known: Sequence[Target], manifest: Manifest) -> str:
    return as_table([(t.name, _answer(t, manifest)) for t in known], ("target", "serves it"))


def _answer(target: Target, manifest: Manifest) -> str:
    try:
        targets.check_serves(target, manifest, _memory(target))
    except UsageError as reason:
        return str(reason).partition(": ")[2]
    return "yes"


def _memory(target: Target) -> int | None:
    """This machine's memory if it has the target; another's is not known."""
    return targets.memory_bytes() if target.name in targets.found() else None
