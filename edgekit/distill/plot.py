"""Loss against tokens, a panel per stage, and the held-out perplexity below: `loss.png`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import UsageError
from edgekit.figures import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_losses"]

Record = Mapping[str, Any]
Array = npt.NDArray[np.float64]

STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c8601a", "#2f7d4f", "#6b6b6b"
PARTS = {"cross_entropy": ("cross-entropy", ORANGE), "kl": ("KL to the teacher", GREEN)}
STAGES = {1: "attention transfer", 2: "tuning"}
LOG_RANGE = 8.0  # highest / lowest from which a log axis shows more
SMOOTHING = 40  # a smoothed line averages this part of its points


def draw_losses(records: Sequence[Record], out: Path, *, teacher: float | None = None) -> None:
    """Draw the curves of a training.

    Args:
        records: lines of `metrics.jsonl`: stage, step, tokens (of this stage), loss, and where
            they are known layers, cross_entropy, kl and eval with its perplexity.
        out: the PNG; it appears whole or stays as it was.
        teacher: the teacher's perplexity on the held-out text, drawn as a line.

    Raises:
        UsageError: if no record has a finite loss.
        OSError: if the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = _by_stage(records)
    evaluated = _evaluations(stages)
    if not stages:
        raise UsageError("no record with a finite loss given: there is no curve to draw")
    with rc_context(STYLE):  # type: ignore[arg-type]  # its stubs list every key as a literal
        figure = Figure(
            figsize=(5.0 * max(len(stages), 1.4), 5.4 if len(evaluated) else 3.3),
            layout="constrained",
        )
        FigureCanvasAgg(figure)
        _draw(figure, stages, evaluated, teacher)
        write_png(figure, out)


def _by_stage(records: Sequence[Record]) -> dict[int, list[Record]]:
    stages: dict[int, list[Record]] = {}
    for record in records:
        if record["loss"] is not None and np.isfinite(record["loss"]):
            stages.setdefault(record["stage"], []).append(record)
    return dict(sorted(stages.items()))


def _evaluations(stages: Mapping[int, Sequence[Record]]) -> Array:
    """Tokens of all stages so far, and perplexity there, `[N, 2]`."""
    points, before = [], 0
    for records in stages.values():
        found = [r for r in records if "perplexity" in (r.get("eval") or {})]
        points += [(before + r["tokens"], r["eval"]["perplexity"]) for r in found]
        before += records[-1]["tokens"]
    return np.array(points, dtype=float).reshape(-1, 2)


def _draw(
    figure: "Figure",
    stages: Mapping[int, Sequence[Record]],
    evaluated: Array,
    teacher: float | None,
) -> None:
    rows = 2 if len(evaluated) else 1
    grid = figure.add_gridspec(rows, len(stages), height_ratios=[5, 4][:rows])
    for column, (stage, records) in enumerate(stages.items()):
        axes = figure.add_subplot(grid[0, column])
        _draw_stage(axes, records)
        name = STAGES.get(stage)
        axes.set_title(f"stage {stage}: {name}" if name else f"stage {stage}")
        axes.set_ylabel("loss" if column == 0 else "")
    if len(evaluated):
        ends = np.cumsum([records[-1]["tokens"] for records in stages.values()])
        _draw_perplexity(figure.add_subplot(grid[1, :]), evaluated, ends, teacher)


def _draw_stage(axes: "Axes", records: Sequence[Record]) -> None:
    tokens = np.array([r["tokens"] for r in records], dtype=float)
    loss = np.array([r["loss"] for r in records], dtype=float)
    shown = [loss]
    if all(r.get("layers") for r in records):
        layers = _smooth(np.array([r["layers"] for r in records], dtype=float))
        _draw_layers(axes, tokens, layers)
        shown.append(layers)
    for key, (label, colour) in PARTS.items():
        values = [r.get(key) for r in records]
        if None not in values:
            shown.append(_smooth(np.array(values, dtype=float)))
            axes.plot(tokens, shown[-1], color=colour, linewidth=1.0, label=label)
    axes.plot(tokens, loss, color=BLUE, linewidth=0.5, alpha=0.35)
    dot = "o" if len(loss) == 1 else ""  # a line needs two points
    axes.plot(tokens, _smooth(loss), dot, color=BLUE, linewidth=1.6, label="loss")
    _scale(axes, np.concatenate([values.ravel() for values in shown]))
    _label_tokens(axes, "tokens of this stage", tokens[-1])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="lower right",
        bbox_to_anchor=(1.02, 0.985),
        ncols=len(labels),
        handlelength=1.1,
        handletextpad=0.4,
        columnspacing=0.9,
    )


def _draw_layers(axes: "Axes", tokens: Array, layers: Array) -> None:
    """Bands of `layers [N, L]`: all of them, and the middle half."""
    lowest, low, high, highest = np.percentile(layers, [0, 25, 75, 100], axis=1)
    count = layers.shape[1]
    bands: list[tuple[Array, Array, float, str]] = [
        (lowest, highest, 0.13, f"all {count} layers"),
        (low, high, 0.22, "middle half"),
    ]
    for bottom, top, alpha, label in bands:
        axes.fill_between(tokens, bottom, top, color=BLUE, alpha=alpha, linewidth=0, label=label)


def _draw_perplexity(axes: "Axes", evaluated: Array, ends: Array, teacher: float | None) -> None:
    tokens, perplexity = evaluated.T
    axes.plot(tokens, perplexity, "o-", color=ORANGE, markersize=3.5, linewidth=1.2)
    axes.annotate(
        f"{perplexity[-1]:.4g}",
        (tokens[-1], perplexity[-1]),
        xytext=(0, 7),
        textcoords="offset points",
        ha="right",
        color=ORANGE,
    )
    for end in ends[:-1]:
        axes.axvline(end, color=GREY, linewidth=0.8, linestyle=":")
    values = perplexity
    if teacher is not None:
        axes.axhline(teacher, color=GREY, linewidth=1.0, linestyle="--")
        axes.annotate(
            f"teacher {teacher:.4g}",
            (0, teacher),
            xytext=(3, 4),
            textcoords="offset points",
            color=GREY,
        )
        values = np.append(values, teacher)
    axes.set_title("perplexity of the student on held-out text")
    axes.set_ylabel("perplexity")
    _scale(axes, values)
    _label_tokens(axes, "tokens of all stages", ends[-1])


def _scale(axes: "Axes", values: Array) -> None:
    """A log axis with plain numbers where the values span much, a linear one otherwise."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if values.min() <= 0 or values.max() / values.min() < LOG_RANGE:
        return
    axes.set_yscale("log")
    decades = np.log10(values.max() / values.min())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_tokens(axes: "Axes", label: str, last: float) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(0, last * 1.03)


def _smooth(values: Array) -> Array:
    """A centred running mean along the first axis; at the ends over what is there."""
    width = len(values) // SMOOTHING
    if width < 2:
        return values
    kernel = np.ones(width)
    counts = np.convolve(np.ones(len(values)), kernel, "same")
    columns = values.reshape(len(values), -1).T
    sums = np.stack([np.convolve(column, kernel, "same") for column in columns], axis=1)
    return (sums / counts[:, None]).reshape(values.shape)
