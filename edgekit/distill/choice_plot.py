"""The picture of a choice of layers: a bar for each, tall where softmax attention is worth most."""

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.distill.layer_choice import Choice
from edgekit.figures import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_choice"]

CHOSEN, OTHER, INK = "#c8601a", "#9db4cf", "#444444"


def draw_choice(choice: Choice, out: Path) -> None:
    """Write a PNG of what each layer gains alone, with its interval; the chosen ones stand out.

    Raises:
        OSError: if the file cannot be written; an earlier one then stays as it was.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.5, 1.5 + 0.26 * len(choice.ranking)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    _bars(figure.add_subplot(), choice)
    write_png(figure, out)


def _bars(axes: "Axes", choice: Choice) -> None:
    order = {step.layer: place for place, step in enumerate(choice.steps, 1)}
    by_layer = sorted(choice.ranking, key=lambda restored: restored.layer)
    layers = [restored.layer for restored in by_layer]
    gains = [restored.gain.value for restored in by_layer]
    spreads = [restored.gain.spread or 0.0 for restored in by_layer]
    colours = [CHOSEN if layer in order else OTHER for layer in layers]
    axes.bar(layers, gains, yerr=spreads, color=colours, ecolor=INK, error_kw={"linewidth": 0.8})
    for layer, gain, spread in zip(layers, gains, spreads, strict=True):
        if layer in order:
            place = (layer, max(gain + spread, 0.0))
            axes.annotate(
                str(order[layer]),
                place,
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=CHOSEN,
            )
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_xticks(layers, [str(layer) for layer in layers], fontsize=7)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xlabel("layer given its softmax attention back, alone", fontsize=8)
    axes.set_ylabel("fall of KL to the teacher (nats)", fontsize=8)
    chosen = "greedily" if choice.greedy else "by the ranking"
    title = f"student: KL {choice.kl:.3f}; with the {len(order)} chosen {chosen}: "
    axes.set_title(f"{title}{choice.steps[-1].kl:.3f}", fontsize=9, loc="left")
