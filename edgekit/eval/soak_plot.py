"""The picture of a soak: memory above, error below, against the tokens read."""

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.eval.soak_report import ALLOWED_GROWTH, Soak
from edgekit.figures import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_soak"]

BLUE, ORANGE, GREY = "#1f5fa8", "#c8601a", "#6b6b6b"


def draw_soak(soak: Soak, out: Path) -> None:
    """Write a PNG; a dotted line stands where an interrupted soak went on in a new process.

    Raises:
        OSError: if the file cannot be written; an earlier one then stays as it was.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_memory(upper, soak)
    _draw_error(lower, soak)
    tokens = [checkpoint.tokens for checkpoint in soak.checkpoints]
    runs = [checkpoint.run for checkpoint in soak.checkpoints]
    for axes in (upper, lower):
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for place, before, after in zip(tokens, runs, runs[1:], strict=False):
            if after != before:
                axes.axvline(place, color=GREY, linestyle=":", linewidth=1)
    lower.set_xlabel("tokens read by one session")
    lower.xaxis.set_major_formatter("{x:,.0f}")
    write_png(figure, out)


def _draw_memory(axes: "Axes", soak: Soak) -> None:
    known = [(c.tokens, c.rss / 1e6) for c in soak.checkpoints if c.rss is not None]
    axes.set_title(f"resident memory (MB): {soak.bundle} on {soak.engine}", fontsize=10, loc="left")
    if known:
        tokens, sizes = zip(*known, strict=True)
        axes.plot(tokens, sizes, "o-", color=BLUE, markersize=3)
        axes.axhline(sizes[0] * (1 + ALLOWED_GROWTH), color=ORANGE, linewidth=1)
        axes.set_ylim(0, 1.15 * max(*sizes, sizes[0] * (1 + ALLOWED_GROWTH)))


def _draw_error(axes: "Axes", soak: Soak) -> None:
    tokens = [checkpoint.tokens for checkpoint in soak.checkpoints]
    errors = [checkpoint.error for checkpoint in soak.checkpoints]
    axes.plot(tokens, errors, "o-", color=BLUE, markersize=3)
    axes.set_title(f"error of the logits against {soak.reference}", fontsize=10, loc="left")
    if max(errors) > 0:
        axes.set_yscale("log")
    if soak.allowed_error is not None:
        axes.axhline(soak.allowed_error, color=ORANGE, linewidth=1)
