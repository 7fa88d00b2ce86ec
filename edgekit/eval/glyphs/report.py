"""Figures of the glyph world's methods: each seed's are kept, and those of several make a table."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError
from edgekit.sources.base import read_json

__all__ = ["HEADERS", "figures_row", "kept_methods"]

HEADERS = ("settings", "C_S", "C_I", "recall", "F1", "objects")


def kept_methods(file: Path, settings: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """The methods that `file` has, or else those that `measure` finds, which it gets.

    Args:
        file: JSON of settings and methods; it appears whole or not at all.
        settings: JSON-ready; what the figures depend on.
        measure: returns the methods, JSON-ready.

    Raises:
        UsageError: if the file is of other settings.
    """
    if file.is_file():
        found = read_json(file)
        if found["settings"] != settings:
            raise UsageError(f"{file} is of other settings; give another folder")
        return found["methods"]
    methods = measure()
    text = json.dumps({"settings": settings, "methods": methods}, indent=1) + "\n"
    unfinished = file.with_suffix(".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(file)
    return methods


def figures_row(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells below `HEADERS`: means, and each seed's figure in brackets.

    Args:
        found: of each seed, its `Chair` as a dictionary, and `spin`, its settings or None.
    """
    settings = "; ".join(dict.fromkeys(_settings(figures["spin"]) for figures in found))
    shares = [_cell([100 * f[key] for f in found]) for key in ("c_s", "c_i", "recall", "f1")]
    return [settings, *shares, _cell([f["objects"] for f in found], 2)]


def _cell(values: Sequence[float], digits: int = 1) -> str:
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{sum(values) / len(values):.{digits}f} ({each})"


def _settings(spin: Mapping[str, Any] | None) -> str:
    if spin is None:
        return ""
    layers = "all layers" if spin["layers"] is None else f"layers {spin['layers']}"
    return f"{spin['suppress']} heads, alpha {spin['alpha']}, {layers}"
