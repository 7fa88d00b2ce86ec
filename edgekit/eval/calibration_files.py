"""A calibration on disk: the settings for `--spin`, all figures, and the picture of the heads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.config import dump, load
from edgekit.errors import UsageError
from edgekit.eval.calibration import Calibration
from edgekit.figures import write_png
from edgekit.models.spin import SpinConfig
from edgekit.utf8 import read_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FIGURES", "SETTINGS", "draw_heads", "read_calibration", "write_calibration"]

FIGURES, SETTINGS, PICTURE = "calibration.json", "spin.toml", "heads.png"
COLOURS, INK = "viridis", "#222222"


def write_calibration(calibration: Calibration, folder: Path) -> None:
    """Write `calibration.json`, `heads.png` and, if anything is suggested, `spin.toml`.

    Raises:
        OSError: if a file cannot be written.
    """
    draw_heads(calibration, folder / PICTURE)
    settings = folder / SETTINGS
    if calibration.spin is None:
        settings.unlink(missing_ok=True)  # of an earlier calibration
    else:
        settings.write_text(as_toml(calibration.spin), encoding="utf-8")
    text = json.dumps(dump(calibration), indent=1, ensure_ascii=False)
    (folder / FIGURES).write_text(text + "\n", encoding="utf-8")


def read_calibration(folder: Path) -> Calibration:
    """What `write_calibration` wrote.

    Raises:
        UsageError: if it is missing or damaged.
    """
    path = folder / FIGURES
    try:
        found = json.loads(read_text(path))
    except ValueError as cause:
        raise UsageError(f"{path}: damaged ({cause}); calibrate again") from cause
    return load(Calibration, found, where=str(path), error=UsageError)


def as_toml(spin: SpinConfig) -> str:
    """Settings as `edgekit.spin.presets.read_spin` reads them."""
    values = {key: value for key, value in dump(spin).items() if value is not None}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def draw_heads(calibration: Calibration, out: Path) -> None:
    """Write a PNG with a square for each layer and head, coloured by the head's mean score.

    A dot marks the heads that the suggestion's static form suppresses.

    Raises:
        OSError: if the file cannot be written; an earlier one then stays as it was.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(calibration.scores)
    height, width = rows.shape
    size = (2.6 + 0.34 * width, 1.9 + 0.26 * height)
    figure = Figure(figsize=(max(size[0], 4.2), size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(rows, cmap=COLOURS, aspect="auto")
    _mark(axes, calibration.heads)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, width, max(1, width // 16)))
    axes.set_yticks(range(0, height, max(1, height // 16)))
    axes.spines[:].set_visible(False)
    kind = "image mass" if calibration.options.score == "mass" else "image logits"
    title = f"{calibration.model}: mean {kind} of {calibration.validation} pictures"
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    write_png(figure, out)


def _rows(scores: Mapping[str, Sequence[float]]) -> "np.ndarray[Any, Any]":
    """`[layers, heads]`, the first layer on top."""
    return np.array([scores[layer] for layer in sorted(scores, key=int)])


def _mark(axes: "Axes", heads: Mapping[str, Sequence[int]]) -> None:
    places = [(head, int(layer)) for layer, chosen in heads.items() for head in chosen]
    if places:
        x, y = zip(*places, strict=True)
        axes.scatter(x, y, s=14, color="white", edgecolors=INK, linewidths=0.6)
