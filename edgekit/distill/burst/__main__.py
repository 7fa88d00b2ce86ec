"""`python -m edgekit.distill.burst`: `pack` before a burst, `collect` after it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edgekit.distill import burst
from edgekit.errors import EdgekitError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    cut = given.index("--") if "--" in given else len(given)
    args = _parser().parse_args(given[:cut])
    try:
        if args.step == "pack":
            _pack(args, given[cut + 1 :])
        else:
            from edgekit.distill.burst.collect import collect

            print(collect(args.results, args.output))
    except EdgekitError as error:
        print(f"burst: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edgekit.distill.burst",
        description=burst.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("pack", help="everything that the far machine lacks", usage=PACK)
    step.add_argument("folder", type=Path, metavar="BURST", help="to write into")
    step.add_argument("--python", metavar="3.N", help="there (default: as here); x86-64 Linux")
    step.add_argument("--part-mib", type=int, default=60, help="size of a part (default: 60)")
    step = steps.add_parser("collect", help="take what a burst left")
    step.add_argument("results", type=Path, metavar="OUT")
    step.add_argument("-o", "--output", type=Path, required=True, metavar="STUDENT")
    return parser


PACK = "%(prog)s [-h] [--python 3.N] [--part-mib N] BURST -- SOURCE -o STUDENT ..."


def _pack(args: argparse.Namespace, arguments: list[str]) -> None:
    from edgekit.distill.burst.pack import BURST, pack

    plan = pack(args.folder, arguments, python=args.python, part_mib=args.part_mib)
    for name in (BURST, *plan.parts):
        print(f"{args.folder / name}  {(args.folder / name).stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
