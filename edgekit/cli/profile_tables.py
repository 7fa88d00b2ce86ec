"""Reports of `edgekit profile` as text: tables for people, rows for spreadsheets, JSON."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.cli.output import as_json, as_markdown, as_table, size

if TYPE_CHECKING:
    from edgekit.profiling.comparison import Pair
    from edgekit.runtime.latency import Report

__all__ = ["FORMATS", "as_comparison", "rendered"]

FORMATS = ("table", "json", "csv", "md", "llm-bench", "llama-bench")
HEADERS = (
    "bundle",
    "engine",
    "threads",
    "test",
    "tok/s",
    "ttft ms",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "J/token",
    "state",
    "peak RSS",
)
SHOWN = 12  # operators of a test


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One line of the table: a prompt (`pp1024`) or a decode depth (`tg64 @ 4096`)."""

    bundle: str
    engine: str
    threads: int | None
    test: str
    rate: float
    ttft: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    joules: float | None = None
    state: int | None = None
    rss: int | None = None

    def cells(self) -> tuple[str, ...]:
        times = (_number(t, 2) for t in (self.ttft, self.p50, self.p90, self.p99))
        sizes = (size(self.state), size(self.rss))
        threads = "all" if self.threads is None else str(self.threads)
        named = (self.bundle, self.engine, threads, self.test, f"{self.rate:.1f}")
        return (*named, *times, _number(self.joules, 3), *sizes)


def rendered(reports: Sequence["Report"], form: str) -> str:
    """The reports in one of `FORMATS`."""
    if form == "json":
        return as_json(reports)
    if form in ("llm-bench", "llama-bench"):
        from edgekit.profiling import interchange

        made = interchange.llm_bench if form == "llm-bench" else interchange.llama_bench
        return as_json(made(reports))
    rows = [row for report in reports for row in _rows(report)]
    if form == "csv":
        return _csv(rows)
    return "\n".join(_parts(reports, rows, markdown=form == "md"))


def as_comparison(
    name: str, pairs: Sequence["Pair"], others: Sequence[str], *, markdown: bool
) -> str:
    """Speeds side by side, and ours over the fastest other.

    Args:
        name: of ours.
        pairs: of `compared`.
        others: the names of the other columns.
        markdown: whether to make a Markdown table.
    """
    headers = ("test, tok/s", name, *others, "ratio to the fastest", "worst to best")
    rows = [
        (
            pair.test,
            f"{pair.ours.median:.1f}",
            *(f"{pair.others[o].median:.1f}" if o in pair.others else "-" for o in others),
            f"{pair.ratio:.2f}",
            "{:.2f} to {:.2f}".format(*pair.range),
        )
        for pair in pairs
    ]
    return as_markdown(rows, headers) if markdown else as_table(rows, headers)


def _parts(reports: Sequence["Report"], rows: Sequence[_Row], *, markdown: bool) -> Iterator[str]:
    table = as_markdown if markdown else as_table
    yield table([row.cells() for row in rows], HEADERS)
    for report in reports:
        for operators in report.operators:
            yield f"\n{report.engine}, {operators.test}: operators take {operators.ms:.2f} ms\n"
            lines = [
                (o.type, f"{o.count:.0f}", f"{o.ms:.2f}", f"{100 * o.ms / operators.ms:.1f}")
                for o in operators.operators[:SHOWN]
            ]
            yield table(lines, ("operator", "nodes", "ms", "%"))
    yield ""
    yield from map(_footer, reports)


def _rows(report: "Report") -> Iterable[_Row]:
    for p in report.prefill:
        yield _Row(
            bundle=report.bundle,
            engine=report.engine,
            threads=report.threads,
            test=f"pp{p.tokens}",
            rate=p.tokens_per_second.median,
            ttft=p.ttft_ms.median,
            joules=p.joules_per_token,
        )
    peaks: Mapping[str, int] = (report.memory.depth or {}) if report.memory else {}
    for d in report.decode:
        yield _Row(
            bundle=report.bundle,
            engine=report.engine,
            threads=report.threads,
            test=f"tg{d.tokens} @ {d.depth}",
            rate=d.tokens_per_second.median,
            p50=d.p50_ms,
            p90=d.p90_ms,
            p99=d.p99_ms,
            joules=d.joules_per_token,
            state=d.state_bytes,
            rss=peaks.get(str(d.depth)),
        )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


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
        f"{mixers}{adapters}; model {size(report.model_bytes)}, {_loading(report)}, "
        f"peak RSS {peak}; "
        f"{report.repeat} repetitions, threads: {threads}; {report.cpu}, {report.cpu_count} CPUs, "
        f"load before: {load}; "
        f"{versions}; output md5 {report.output_md5[:12] or '-'}"
        f"{'' if report.complete else '; INTERRUPTED, not complete'}"
    )


def _loading(report: "Report") -> str:
    plain = f"load {report.load_ms:.0f} ms, compile {report.compile_ms:.0f} ms"
    s = report.starting
    if s is None:
        return plain
    cold, cached = f"{s.cold_load:.0f} / {s.cold_compile:.0f}", f"{s.cached_load:.0f}"
    return f"{plain} (a cache of blobs: cold {cold}, then {cached} / {s.cached_compile:.0f} ms)"
