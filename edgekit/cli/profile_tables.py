"""Reports of `edgekit profile` as text: tables for people, rows for spreadsheets, JSON."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.cli.output import as_json, as_markdown, as_table, size

if TYPE_CHECKING:
    from edgekit.peers import PeerReport
    from edgekit.peers.floor import Bandwidth, Floor
    from edgekit.profiling.comparison import Measured, Pair
    from edgekit.runtime.latency import Decode, Report

__all__ = ["FORMATS", "TABLES", "compared_text", "floor_table"]

TABLES = ("table", "md")  # for people; the others are for programs
FORMATS = (*TABLES, "json", "csv", "llm-bench", "llama-bench")
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


def compared_text(ours: Sequence["Report"], others: Sequence["Measured"], form: str) -> str:
    """Everything in one of `FORMATS`; tables have ours beside the others too."""
    from edgekit.profiling.comparison import compared, named
    from edgekit.runtime.latency import Report

    if form == "json":
        return as_json([*ours, *others])
    reports = [*ours, *(other for other in others if isinstance(other, Report))]
    text = _rendered(reports, form)
    if form not in TABLES or not others:
        return text
    notes = [_peer_line(other) for other in others if not isinstance(other, Report)]
    names = named([*ours, *others])
    beside = dict(list(names.items())[len(ours) :])
    tables = [
        _comparison(name, compared(report, beside), list(beside), markdown=form == "md")
        for name, report in zip(names, ours, strict=False)
    ]
    return "\n\n".join(["\n".join([text, *notes]), *tables])


def floor_table(
    bandwidth: "Bandwidth",
    rows: Sequence[tuple[str, "Floor", "Decode | None"]],
    *,
    markdown: bool,
) -> str:
    """The least time of a token beside what was measured.

    Args:
        bandwidth: of this machine.
        rows: engine, floor, and what was measured at its depth.
        markdown: whether to make a Markdown table.
    """
    rate = bandwidth.bytes_per_second
    head = (
        f"\n\nmemory is read at {rate.high / 1e9:.1f} GB/s ({rate.low / 1e9:.1f} to "
        f"{rate.high / 1e9:.1f}) by {bandwidth.threads} threads\n"
    )
    cells = [
        (
            engine,
            floor.depth,
            size(floor.weight_bytes),
            size(floor.state_bytes),
            f"{floor.ms_per_token:.2f}",
            _number(row.p50_ms if row else None, 2),
            _number(row.p50_ms / floor.ms_per_token if row else None, 2),
        )
        for engine, floor, row in rows
    ]
    headers = ("engine", "depth", "weights read", "state", "floor ms", "p50 ms", "of the floor")
    return head + "\n" + (as_markdown if markdown else as_table)(cells, headers)


def _peer_line(peer: "PeerReport") -> str:
    versions = ", ".join(f"{name} {version}" for name, version in peer.versions.items())
    setup = peer.setup
    settings = ", ".join(f"{k}={v}" for k, v in setup.settings.items()) if setup else "-"
    threads = "engine's choice" if setup is None or setup.threads is None else setup.threads
    missing = "".join(f"; {m.row} {m.tokens}: {m.note}" for m in peer.missing)
    return (
        f"{peer.model} on {peer.peer}: model {size(peer.model_bytes)}, load "
        f"{_number(peer.load_ms, 0)} ms, peak RSS {size(peer.peak_rss)}; {peer.repeat} "
        f"repetitions, threads: {threads}; {settings}; {versions}{missing}"
    )


def _rendered(reports: Sequence["Report"], form: str) -> str:
    if form in ("llm-bench", "llama-bench"):
        from edgekit.profiling import interchange

        made = interchange.llm_bench if form == "llm-bench" else interchange.llama_bench
        return as_json(made(reports))
    rows = [row for report in reports for row in _rows(report)]
    if form == "csv":
        return _csv(rows)
    return "\n".join(_parts(reports, rows, markdown=form == "md"))


def _comparison(
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
    graph = "" if report.graph == "dynamic" else f" ({report.graph} graph)"
    return (
        f"{report.bundle} on {report.engine} {report.device}{graph}: {report.weights}, "
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
