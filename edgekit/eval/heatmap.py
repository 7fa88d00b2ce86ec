"""The picture of a retrieval measurement: length by depth, as needle papers show it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import UsageError
from edgekit.eval.cells import Cell
from edgekit.eval.retrieval import Retrieval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_heatmap"]

COLOURS = "viridis"  # made for the colour-blind too: its lightness rises evenly
LIGHT_ABOVE = 0.6  # from here on the colour is light and its text dark
MISSING = "#d9d9d9"
INK = "#222222"


def draw_heatmap(result: Retrieval, path: Path) -> None:
    """Write a PNG with a square for each length and depth.

    Above each length stands its accuracy with Wilson's 95 % interval; a length that the model
    cannot read is grey and hatched.

    Raises:
        UsageError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    depths = sorted({d.depth for cell in result.cells for d in cell.depths}) or [0.0]
    size = (max(5.6, 2.2 + 1.05 * len(result.cells)), 2.1 + 0.36 * len(depths))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = _squares(axes, result.cells, depths)
    _label(axes, result, depths)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.02)
    bar.ax.set_yticklabels(["0%", "50%", "100%"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    try:
        figure.savefig(path, dpi=160)
    except OSError as cause:
        raise UsageError(f"{path}: cannot be written ({cause.strerror})") from cause
    finally:
        pyplot.close(figure)


def _squares(axes: "Axes", cells: Sequence[Cell], depths: Sequence[float]) -> Any:
    """Colour and figure of every square; depth runs downwards."""
    shares = np.full((len(depths), len(cells)), np.nan)
    for x, cell in enumerate(cells):
        for found in cell.depths:
            shares[depths.index(found.depth), x] = found.correct / found.samples
    axes.set_facecolor(MISSING)
    image = axes.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    for (y, x), share in np.ndenumerate(shares):
        if np.isfinite(share):
            ink = INK if share >= LIGHT_ABOVE else "white"
            axes.text(x, y, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=8)
    return image


def _label(axes: "Axes", result: Retrieval, depths: Sequence[float]) -> None:
    cells = result.cells
    axes.set_xticks(range(len(cells)), [f"{cell.length:,}" for cell in cells])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the needle")
    axes.set_xticks(np.arange(0.5, len(cells) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(depths) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for x, cell in enumerate(cells):
        axes.annotate(
            _summary(cell),
            (x, 1),
            (0, 6),
            axes.get_xaxis_transform(),
            "offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
        if cell.refused is not None:
            axes.axvspan(x - 0.5, x + 0.5, fill=False, hatch="///", edgecolor="#999999", lw=0)
    counts = " or ".join(str(n) for n in sorted({cell.samples for cell in cells} - {0})) or "no"
    title = f"{result.task}, {result.model} ({result.settings['engine']})"
    axes.set_title(title, fontsize=11, loc="left", pad=46, color=INK)
    below = f"{counts} samples per length; share that is right, and its 95% interval"
    axes.annotate(below, (0, 1), (0, 34), "axes fraction", "offset points", fontsize=8, color=INK)


def _summary(cell: Cell) -> str:
    if cell.accuracy is None or cell.interval is None:
        return "over the\ncontext limit"
    low, high = cell.interval
    return f"{cell.accuracy:.0%}\n{100 * low:.0f} to {100 * high:.0f}"
