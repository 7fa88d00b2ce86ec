"""The figures of all methods as two tables in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgekit.markdown import markdown_table

__all__ = ["report"]

TITLE = (
    "Trained by the project on composed pictures, not a published model: compare lines with each "
    "other only. Settings were chosen on other pictures than these; intervals are 95 %."
)
CHAIR = ("method", "settings", "C_S", "C_I", "recall", "F1", "objects", "words", "cost")
POPE = ("method", "questions", "accuracy", "precision", "recall", "F1", "yes", "invalid")
COST = "Cost: seconds of a batch's step, the baseline's being 1; with few pictures it is noise."


def report(results: Mapping[str, Any]) -> str:
    """The tables, with a line before them that says what they are.

    Args:
        results: of `experiment.measured`.
    """
    base = _pace(results["baseline"]["chair"])
    captions = [_captions(name, found, base) for name, found in results.items()]
    asked = [row for name, found in results.items() for row in _asked(name, found["pope"])]
    parts = [TITLE, markdown_table(captions, CHAIR), COST, markdown_table(asked, POPE)]
    return "\n\n".join(parts) + "\n"


def _captions(name: str, found: Mapping[str, Any], base: float) -> list[str]:
    chair = found["chair"]
    return [
        name,
        _settings(found["spin"]),
        _share(chair["c_s"], chair["c_s_interval"]),
        _share(chair["c_i"], chair["c_i_interval"]),
        _share(chair["recall"]),
        _share(chair["f1"], chair["f1_interval"]),
        f"{chair['objects']:.2f}",
        f"{chair['words']:.1f}",
        f"{_pace(chair) / base:.2f}",
    ]


def _asked(name: str, splits: Mapping[str, Any]) -> Iterator[list[str]]:
    for kind, found in splits.items():
        accuracy = _share(found["accuracy"], found["interval"])
        shares = [_share(found[key]) for key in ("precision", "recall", "f1", "yes_ratio")]
        yield [name, f"{found['questions']} {kind}", accuracy, *shares, str(found["invalid"])]


def _pace(chair: Mapping[str, Any]) -> float:
    return float(chair["seconds"] / chair["passes"])


def _share(value: float, interval: Sequence[float] = ()) -> str:
    """In percent, with its interval if there is one."""
    bounds = f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})" if interval else ""
    return f"{100 * value:.1f}{bounds}"


def _settings(spin: Mapping[str, Any] | None) -> str:
    if spin is None:
        return ""
    layers = "all layers" if spin["layers"] is None else "layers {}-{}".format(*spin["layers"])
    return f"{spin['suppress']} heads, alpha {spin['alpha']}, {layers}"
