"""Measure a bundle: prefill and decode speed, time to first token, loading, memory, state size.

Decoding is measured at each --depth, the number of tokens read before. Figures are the median of
--repeat repetitions; each of them is in the JSON. The engines and numbers of threads of a list are
measured one after the other. Interrupted, it still writes what was measured.

    edgekit profile out --depth 128,4096,32768 --plot latency.png
    edgekit profile out --compare other-bundle --compare last-week.json
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.cli.arguments import add_adapters, add_device, choices, heard, positive
from edgekit.cli.output import write_text
from edgekit.cli.profile_tables import FORMATS, as_comparison, rendered
from edgekit.command import numbers
from edgekit.errors import UsageError
from edgekit.targets.schema import ENGINES

if TYPE_CHECKING:
    from edgekit.runtime.latency import Options, Report

__all__ = ["HELP", "add_arguments", "run"]

HELP = "measure speed and memory of a bundle"
BUSY = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path)
    add("--engine", type=choices(ENGINES), help="one, or a list such as openvino,onnx")
    add_device(parser)
    add("--threads", type=numbers, metavar="N,N", help="CPU threads, to sweep (default: as `run`)")
    add_adapters(parser)
    add("--prompt", type=numbers, default=(128, 1024), metavar="N,N", help="prompt lengths")
    add("--gen", type=positive, default=64, metavar="N", help="tokens decoded")
    add("--depth", type=numbers, default=(0, 4096), metavar="N,N", help="tokens read before")
    add("--repeat", type=positive, default=3, metavar="N")
    add("--load", action="store_true", help="load twice more: without and with a cache of blobs")
    add("--ops", action="store_true", help="the time of every type of operator")
    add(
        "--compare",
        action="append",
        default=[],
        type=Path,
        metavar="OTHER",
        help="a bundle to measure after this one, or a report in JSON; may be given again",
    )
    add("--plot", type=Path, metavar="FILE", help="a PNG of latency against depth")
    add("--format", choices=FORMATS, default="table")
    add("-o", "--output", type=Path, metavar="FILE", help="write there instead")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    _check(args)
    ours: list[Report] = []
    others: list[Report] = []
    try:
        _measure(args, args.bundle, ours)
        _warn_if_busy(ours[0])  # the load before a later one is that of the earlier
        for other in args.compare:
            _add_other(args, other, others)
    finally:  # when interrupted too
        if ours:
            write_text(_text(ours, others, args.format), args.output)
    if args.plot is not None:
        from edgekit.profiling.comparison import named
        from edgekit.profiling.plot import draw_latency

        draw_latency(named([*ours, *others]), args.plot)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse at once what would fail after minutes."""
    for other in args.compare:
        if not other.exists():
            raise UsageError(f"{other} given; allowed: a bundle, or what --format json -o wrote")
    for out in (args.plot, args.output):
        if out is not None and not out.parent.is_dir():
            raise UsageError(f"{out} given; {out.parent} is no directory")


def _measure(args: argparse.Namespace, bundle: Path, reports: list["Report"]) -> None:
    """Measure every variant; `reports` has what is known at any time."""
    from edgekit.cli.progress import Progress
    from edgekit.runtime.latency import measure

    for options in _variants(args):
        place = len(reports)

        def keep(report: "Report", place: int = place) -> None:
            reports[place:] = [report]

        with heard(), Progress() as progress:
            measure(bundle, options, progress.step, keep)


def _variants(args: argparse.Namespace) -> Iterator["Options"]:
    """Every engine with every number of threads."""
    from edgekit.runtime.latency import Options

    for engine in args.engine or (None,):
        for threads in args.threads or (None,):
            yield Options(
                prompts=args.prompt,
                depths=args.depth,
                tokens=args.gen,
                repeat=args.repeat,
                engine=engine,
                device=args.device,
                threads=threads,
                starting=args.load,
                operators=args.ops,
                adapters=tuple(args.adapters),
            )


def _add_other(args: argparse.Namespace, other: Path, reports: list["Report"]) -> None:
    if other.is_file():
        reports += _read(other)
    else:
        _measure(args, other, reports)


def _read(path: Path) -> list["Report"]:
    """Reports that `--format json` wrote.

    Raises:
        UsageError: if it is something else.
    """
    import json

    from edgekit import config
    from edgekit.runtime.latency import Report

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [config.load(Report, item, where=str(path), error=UsageError) for item in data]
    except (ValueError, TypeError) as cause:
        raise UsageError(f"{path}: {cause}; allowed: what --format json -o wrote") from cause


def _text(ours: Sequence["Report"], others: Sequence["Report"], form: str) -> str:
    text = rendered([*ours, *others], form)
    if form not in ("table", "md") or not others:
        return text
    from edgekit.profiling.comparison import compared, named

    names = named([*ours, *others])
    beside = {name: report for name, report in names.items() if report in others}
    tables = [
        as_comparison(name, compared(report, beside), list(beside), markdown=form == "md")
        for name, report in names.items()
        if report in ours
    ]
    return "\n\n".join([text, *tables])


def _warn_if_busy(report: "Report") -> None:
    load = report.load_average[0] if report.load_average else None
    if load is not None and load > BUSY:
        print(
            f"edgekit: the machine was busy before the measurement (load {load:.1f} on "
            f"{report.cpu_count} CPUs); figures may be too low",
            file=sys.stderr,
        )
