"""Loss against steps, a panel per stage: `loss.png`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.eval.stamps.training import STAGES
from edgekit.figures import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_losses"]

SMOOTHING = 40  # a smoothed line averages this part of its points
BLUE = "#1f5fa8"


def draw_losses(records: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw the curves of a training.

    Args:
        records: lines of `metrics.jsonl`.
        out: the PNG; it appears whole or stays as it was.

    Raises:
        OSError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(STAGES):
        axes = figure.add_subplot(1, len(STAGES), number + 1)
        found = [record for record in records if record["stage"] == number]
        _draw(axes, [r["step"] for r in found], [r["loss"] for r in found])
        axes.set_title(f"stage {number + 1}: {name}", loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("" if number else "loss")
    write_png(figure, out)


def _draw(axes: "Axes", steps: Sequence[int], losses: Sequence[float]) -> None:
    width = max(len(losses) // SMOOTHING, 1)
    axes.plot(steps, losses, color=BLUE, linewidth=0.5, alpha=0.35)
    if len(losses) >= width and losses:
        smooth = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=BLUE, linewidth=1.6)
    axes.grid(color="#e4e4e4", linewidth=0.6)
