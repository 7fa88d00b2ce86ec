"""List the device profiles, or show one with the provenance of each setting."""

import argparse
import dataclasses
from collections.abc import Sequence

from edgekit import targets
from edgekit.cli.arguments import add_json
from edgekit.cli.output import as_json, as_table
from edgekit.targets import Target

__all__ = ["HELP", "add_arguments", "run"]

HELP = "list device profiles, or show one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="the target to show")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the profiles; returns the exit code."""
    if args.name is None:
        known = [targets.load(name) for name in targets.names()]
        print(as_json(known) if args.json else _listing(known, targets.detect()))
        return 0
    target = targets.load(args.name)
    print(as_json(target) if args.json else _details(target))
    return 0


def _listing(known: Sequence[Target], here: str) -> str:
    rows = [("*" if t.name == here else "", t.name, t.description) for t in known]
    return as_table(rows, ("", "target", "for")) + "\n\n* what `--target auto` takes here"


def _details(target: Target) -> str:
    shown = [f.name for f in dataclasses.fields(target) if f.name != "provenance"]
    rows = [(name, getattr(target, name), target.provenance.get(name, "")) for name in shown]
    return as_table(rows, ("setting", "value", "where it comes from"))
