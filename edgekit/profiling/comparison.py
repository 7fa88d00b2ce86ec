"""One report beside others, test by test, as ratios of their speeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgekit.peers.report import PeerReport
from edgekit.runtime.latency import Report, Spread

__all__ = ["Measured", "Pair", "compared", "named", "speeds"]

Measured = Report | PeerReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One test of ours beside the same test of others.

    Attributes:
        test: `pp1024` or `tg64 @ 4096`.
        ours: tokens per second.
        others: the same by the name of what was measured; those without this test are left out.
    """

    test: str
    ours: Spread
    others: Mapping[str, Spread]

    @property
    def fastest(self) -> str:
        """The name of the fastest other."""
        return max(self.others, key=lambda name: self.others[name].median)

    @property
    def ratio(self) -> float:
        """Our median over that of the fastest other."""
        return self.ours.median / self.others[self.fastest].median

    @property
    def range(self) -> tuple[float, float]:
        """The ratio at worst and at best: our slowest repetition over its fastest, and reversed."""
        other = self.others[self.fastest]
        return self.ours.low / other.high, self.ours.high / other.low


def speeds(report: Measured) -> dict[str, Spread]:
    """Tokens per second by the name of the test."""
    prompts = {f"pp{row.tokens}": row.tokens_per_second for row in report.prefill}
    return prompts | {
        f"tg{row.tokens} @ {row.depth}": row.tokens_per_second for row in report.decode
    }


def compared(ours: Report, others: Mapping[str, Measured]) -> tuple[Pair, ...]:
    """Every test of ours that another has too.

    Args:
        ours: what the ratios are of.
        others: by the names to show.
    """
    theirs = {name: speeds(report) for name, report in others.items()}
    pairs = []
    for test, speed in speeds(ours).items():
        found = {name: tests[test] for name, tests in theirs.items() if test in tests}
        if found:
            pairs.append(Pair(test=test, ours=speed, others=found))
    return tuple(pairs)


def named(reports: Sequence[Measured]) -> dict[str, Measured]:
    """The reports by names that are as short as tells them apart."""
    for parts in NAMED_BY:
        names = [" ".join(part(report) for part in parts) for report in reports]
        if len(set(names)) == len(names):
            return dict(zip(names, reports, strict=True))
    return {f"{name} #{i}": r for i, (name, r) in enumerate(zip(names, reports, strict=True), 1)}


def _engine(report: Measured) -> str:
    return report.peer if isinstance(report, PeerReport) else report.engine


def _bundle(report: Measured) -> str:
    return report.model if isinstance(report, PeerReport) else report.bundle


def _threads(report: Measured) -> str:
    setup = report.setup if isinstance(report, PeerReport) else report
    threads = None if setup is None else setup.threads
    return f"threads {threads or 'all'}"


NAMED_BY = ((_engine,), (_bundle, _engine), (_bundle, _engine, _threads))
