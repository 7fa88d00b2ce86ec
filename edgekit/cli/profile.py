"""Measure a bundle: prefill and decode speed, time to first token, loading, memory, state size.

Decoding is measured at each --depth, the number of tokens read before. Figures are the median of
--repeat repetitions; the lowest and the highest are in the JSON. The engines of a list are measured
one after the other.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.cli.arguments import add_adapters, add_device, choices, heard, positive
from edgekit.cli.output import as_json, as_markdown, as_table, size, write_text
from edgekit.command import numbers
from edgekit.targets.schema import ENGINES

if TYPE_CHECKING:
    from edgekit.runtime.latency import Report

__all__ = ["HELP", "add_arguments", "run"]

HELP = "measure speed and memory of a bundle"
FORMATS = ("table", "json", "csv", "md")
HEADERS = (
    "bundle",
    "engine",
    "test",
    "tok/s",
    "ttft ms",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "state",
    "peak RSS",
)
BUSY = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument(
        "--engine", type=choices(ENGINES), help="one, or a list such as openvino,onnx"
    )
    add_device(parser)
    add_adapters(parser)
    parser.add_argument(
        "--prompt", type=numbers, default=(128, 1024), metavar="N,N", help="prompt lengths"
    )
    parser.add_argument("--gen", type=positive, default=64, metavar="N", help="tokens decoded")
    parser.add_argument(
        "--depth", type=numbers, default=(0, 4096), metavar="N,N", help="tokens read before"
    )
    parser.add_argument("--repeat", type=positive, default=3, metavar="N")
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there instead")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    from edgekit.cli.progress import Progress
    from edgekit.runtime.latency import Options, measure

    reports = []
    for engine in args.engine or (None,):
        options = Options(
            prompts=args.prompt,
            depths=args.depth,
            tokens=args.gen,
            repeat=args.repeat,
            engine=engine,
            device=args.device,
            threads=args.threads,
            adapters=tuple(args.adapters),
        )
        with heard(), Progress() as progress:
            reports.append(measure(args.bundle, options, progress.step))
    _warn_if_busy(reports[0])  # the load before a later one is that of the earlier
    write_text(_render(reports, args.format), args.output)
    return 0


def _warn_if_busy(report: "Report") -> None:
    load = report.load_average[0] if report.load_average else None
    if load is not None and load > BUSY:
        print(
            f"edgekit: the machine was busy before the measurement (load {load:.1f} on "
            f"{report.cpu_count} CPUs); figures may be too low",
            file=sys.stderr,
        )


def _render(reports: Sequence["Report"], form: str) -> str:
    if form == "json":
        return as_json(reports)
    rows = [row for report in reports for row in _rows(report)]
    if form == "csv":
        return _csv(rows)
    cells = [row.cells() for row in rows]
    table = as_markdown(cells, HEADERS) if form == "md" else as_table(cells, HEADERS)
    return "\n".join([table, "", *(_footer(report) for report in reports)])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One line of the table: a prompt (`pp1024`) or a decode depth (`tg64 @ 4096`)."""

    bundle: str
    engine: str
    test: str
    rate: float
    ttft: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    state: int | None = None
    rss: int | None = None

    def cells(self) -> tuple[str, ...]:
        times = (
            "-" if t is None else f"{t:.2f}" for t in (self.ttft, self.p50, self.p90, self.p99)
        )
        sizes = (size(self.state), size(self.rss))
        return (self.bundle, self.engine, self.test, f"{self.rate:.1f}", *times, *sizes)


def _rows(report: "Report") -> Iterable[_Row]:
    memory = report.memory
    for p in report.prefill:
        yield _Row(
            bundle=report.bundle,
            engine=report.engine,
            test=f"pp{p.tokens}",
            rate=p.tokens_per_second.median,
            ttft=p.ttft_ms.median,
        )
    for d in report.decode:
        peaks = memory.depth if memory and memory.depth else {}
        yield _Row(
            bundle=report.bundle,
            engine=report.engine,
            test=f"tg{d.tokens} @ {d.depth}",
            rate=d.tokens_per_second.median,
            p50=d.p50_ms,
            p90=d.p90_ms,
            p99=d.p99_ms,
            state=d.state_bytes,
            rss=peaks.get(str(d.depth)),
        )


def _csv(rows: Iterable[_Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(name for name in _Row.__slots__)
    writer.writerows([getattr(row, name) for name in _Row.__slots__] for row in rows)
    return text.getvalue().rstrip("\n")


def _footer(report: "Report") -> str:
    peak = size(report.memory.total) if report.memory else "-"
    mixers = ", ".join(f"{count} {name}" for name, count in report.mixers.items())
    threads = "engine's choice" if report.threads is None else report.threads
    load = f"{report.load_average[0]:.1f}" if report.load_average else "-"
    adapters = "".join(f", adapter {name} x {w:g}" for name, w in report.adapters.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"{report.bundle} on {report.engine} {report.device}: {report.weights}, "
        f"{mixers}{adapters}; model {size(report.model_bytes)}, load {report.load_ms:.0f} ms, "
        f"compile {report.compile_ms:.0f} ms, peak RSS {peak}; "
        f"{report.repeat} repetitions, threads: {threads}; {report.cpu}, {report.cpu_count} CPUs, "
        f"load before: {load}; "
        f"{versions}; output md5 {report.output_md5[:12]}"
    )
