"""Latency of a token against the tokens read before: the figure that shows constant time."""

from collections.abc import Mapping
from pathlib import Path

from edgekit.figures import write_png
from edgekit.profiling.comparison import Measured
from edgekit.runtime.latency import Steps

__all__ = ["draw_latency"]


def draw_latency(reports: Mapping[str, Measured], out: Path) -> None:
    """Draw the median and the 90th percentile of each report that has decoded.

    Args:
        reports: by the names of the legend.
        out: the PNG to write.

    Raises:
        ImportError: if matplotlib is not installed.
        OSError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, report in reports.items():
        rows: list[Steps] = sorted(report.decode, key=lambda row: row.depth)
        depths = [max(row.depth, 1) for row in rows]
        (line,) = axes.plot(depths, [row.p50_ms for row in rows], marker="o", label=name)
        axes.fill_between(
            depths,
            [row.p50_ms for row in rows],
            [row.p90_ms for row in rows],
            color=line.get_color(),
            alpha=0.15,
        )
    seen = sorted({row.depth for report in reports.values() for row in report.decode})
    axes.set_xscale("log")
    axes.set_xticks([max(depth, 1) for depth in seen], [str(depth) for depth in seen])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens read before")
    axes.set_ylabel("ms per token: median to p90")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    write_png(figure, out)
