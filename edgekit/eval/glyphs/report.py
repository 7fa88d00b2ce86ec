"""Figures of the glyph world's methods over several seeds, as cells of a table."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HEADERS", "figures_row"]

HEADERS = ("settings", "C_S", "C_I", "recall", "F1", "objects")


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
