"""The picture of an ablation: a square for each variant and layer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.distill.ablation_report import Ablation
from edgekit.figures import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_ablation"]

COLOURS = "viridis_r"  # made for the colour-blind too; dark is a large error
LARGEST = 1.0  # error of a student that always says the mean; what is worse looks the same
FIGURES_UP_TO = 14  # layers, with which a square has room for its figure


def draw_ablation(result: Ablation, out: Path) -> None:
    """Write a PNG of every layer's normalised error, the best variant on top.

    Raises:
        OSError: if the file cannot be written; an earlier one then stays as it was.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (4.2 + 0.3 * max(len(result.layers), 10), 1.6 + 0.32 * len(result.scored))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bar = figure.colorbar(_squares(axes, result), ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    _label(axes, result)
    write_png(figure, out)


def _squares(axes: "Axes", result: Ablation) -> Any:
    """The colours, and where there is room the figures."""
    errors = np.array([scored.layers for scored in result.scored])
    largest = min(LARGEST, errors.max())
    image = axes.imshow(errors, cmap=COLOURS, vmin=0, vmax=largest, aspect="auto")
    if len(result.layers) <= FIGURES_UP_TO:
        for (y, x), error in np.ndenumerate(errors):
            ink = "white" if error > 0.5 * largest else "#222222"
            axes.text(x, y, f"{error:.2f}", ha="center", va="center", color=ink, fontsize=7)
    return image


def _label(axes: "Axes", result: Ablation) -> None:
    axes.set_xticks(range(len(result.layers)), [str(i) for i in result.layers], fontsize=7)
    names = [scored.name for scored in result.scored]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xticks(np.arange(0.5, len(result.layers) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer", fontsize=8)
    for y, scored in enumerate(result.scored):
        axes.annotate(
            f"{scored.error:.3f}",
            (1, y),
            (6, 0),
            axes.get_yaxis_transform(),
            "offset points",
            va="center",
            fontsize=8,
        )
    title = f"normalised error of each layer's heads after {result.tokens:,} tokens"
    axes.set_title(f"{title}; right: their mean", fontsize=9, loc="left")
