"""Pictures of a tuning: its loss, and when which projection froze."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit.adapters.tune.recipe import LINEARS
from edgekit.errors import UsageError
from edgekit.figures import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_freezes", "draw_training"]

Record = Mapping[str, Any]
Array = npt.NDArray[np.float64]
BLUE, GREEN = "#1f5fa8", "#2f7d4f"
COLOURS = "viridis"  # its lightness rises evenly: read without colour too
NEVER_TRAINED, NEVER_FROZEN = "#4d4d4d", "#d9d9d9"
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SMOOTHING = 30  # the smoothed line averages this part of the steps


def draw_training(records: Sequence[Record], out: Path) -> None:
    """Draw loss and trained elements against the step.

    Args:
        records: lines of `metrics.jsonl`.
        out: the PNG; it appears whole or stays as it was.

    Raises:
        UsageError: if there is no record.
    """
    if not records:
        raise UsageError("no record given: there is no curve to draw")
    steps, loss, trained = (
        np.array([r[key] for r in records], dtype=float) for key in ("step", "loss", "trainable")
    )
    with _picture(out, 6.4, 4.6) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.plot(steps, loss, color=BLUE, linewidth=0.6, alpha=0.4)
        mark = "o" if len(loss) == 1 else ""  # a line needs two points
        upper.plot(steps, _smooth(loss), mark, color=BLUE, linewidth=1.6)
        upper.set_title("loss (nats by token that is to be predicted)")
        lower.step(steps, trained, where="post", color=GREEN, linewidth=1.6)
        lower.set_ylim(0, trained.max() * 1.1)
        lower.set_title("elements that are trained")
        lower.set_xlabel("step")


def draw_freezes(freezes: Sequence[Record], out: Path, *, steps: int, layers: int) -> None:
    """Draw the step at which each projection froze: a panel for A and one for B.

    Args:
        freezes: records with step (-1: never trained), module and part.
        out: the PNG; it appears whole or stays as it was.
        steps: of the training; the end of the colour scale.
        layers: of the model.

    Raises:
        UsageError: if nothing froze.
    """
    if not freezes:
        raise UsageError("nothing froze: there is no heat map to draw")
    present = {str(r["module"]).rpartition(".")[2] for r in freezes}
    targets = [name for name in LINEARS if name in present]
    size = (3.0 + 0.24 * layers, 1.9 + 0.5 * len(targets))
    with _picture(out, *size) as figure:
        panels = figure.subplots(2, 1, sharex=True)
        for axes, part in zip(panels, ("A", "B"), strict=True):
            image = _panel(axes, _grid(freezes, part, targets, layers), targets, steps)
            axes.set_title(f"{part}: step at which it froze")
        panels[1].set_xlabel("layer")
        bar = figure.colorbar(image, ax=panels, pad=0.02, label="step")
        bar.outline.set_visible(False)
        _legend(figure)


def _grid(freezes: Sequence[Record], part: str, targets: Sequence[str], layers: int) -> Array:
    """Steps `[targets, layers]`; NaN where nothing froze."""
    grid = np.full((len(targets), layers), np.nan)
    for record in freezes:
        names = str(record["module"]).split(".")
        layer = next((int(name) for name in names if name.isdigit()), None)
        if layer is not None and str(record["part"]).endswith(f"_{part}"):
            grid[targets.index(names[-1]), layer] = record["step"]
    return grid


def _panel(axes: "Axes", grid: Array, targets: Sequence[str], steps: int) -> Any:
    from matplotlib import colormaps

    colours = colormaps[COLOURS].with_extremes(under=NEVER_TRAINED, bad=NEVER_FROZEN)
    image = axes.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=0, vmax=steps, aspect="auto")
    rows, columns = grid.shape
    axes.set_yticks(range(rows), targets)
    axes.set_xticks(range(0, columns, max(1, columns // 10)))
    axes.set_xticks(np.arange(0.5, columns - 1), minor=True)
    axes.set_yticks(np.arange(0.5, rows - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image


def _legend(figure: "Figure") -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(color=NEVER_TRAINED, label="never trained"),
        Patch(color=NEVER_FROZEN, label="never frozen, or not adapted"),
    ]
    figure.legend(
        handles=patches,
        loc="outside lower right",
        ncols=2,
        frameon=False,
        fontsize=8,
        handlelength=1,
    )


@contextlib.contextmanager
def _picture(out: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure to draw into, in inches; written when the block ends well."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):  # type: ignore[arg-type]  # its stubs list every key as a literal
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        write_png(figure, out)


def _smooth(values: Array) -> Array:
    """A centred running mean; at the ends over what is there."""
    width = len(values) // SMOOTHING
    if width < 2:
        return values
    kernel = np.ones(width)
    counts = np.convolve(np.ones(len(values)), kernel, "same")
    return np.asarray(np.convolve(values, kernel, "same") / counts)
