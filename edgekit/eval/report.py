"""A comparison as Markdown: a table per task, every share with its interval."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from edgekit.eval.comparison import Comparison, Measured
from edgekit.eval.retrieval import RetrievalOptions
from edgekit.markdown import markdown_table

__all__ = ["as_markdown"]


def as_markdown(comparison: Comparison, measured: Sequence[Measured], command: str) -> str:
    """The tables, what they rest on, and the command that made them."""
    parts = [_perplexity(comparison, measured), *_agreement(comparison, measured)]
    parts += [_needles(options, measured) for options in comparison.needles]
    parts.append("\n".join(_notes(comparison, measured)))
    parts.append(f"Made by:\n\n    {command}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _perplexity(comparison: Comparison, measured: Sequence[Measured]) -> str:
    if "perplexity" not in comparison.text_tasks:
        return ""
    tokens = {
        name: measured[0].texts["perplexity"][name]["predictions"] for name in comparison.texts
    }
    counts = ", ".join(f"{name} {count}" for name, count in tokens.items())
    headers = [f"{name}{unit}" for name in comparison.texts for unit in ("", ", bits/byte")]
    rows = [
        [m.name, *(cell for name in comparison.texts for cell in _text_cells(m, name)), _time(m)]
        for m in measured
    ]
    title = (
        f"Perplexity (95 % interval over windows of {comparison.windows.window} tokens; tokens "
        f"predicted by {measured[0].name}: {counts})"
    )
    return _table(title, ["model", *headers, "seconds"], rows)


def _text_cells(m: Measured, text: str) -> tuple[str, str]:
    found = m.texts["perplexity"][text]
    return (
        f"{found['perplexity']:.2f}{_spread(found['interval'], '.2f')}",
        f"{found['bits_per_byte']:.3f}",
    )


def _time(m: Measured) -> str:
    return f"{sum(found['seconds'] for found in m.texts['perplexity'].values()):.0f}"


def _agreement(comparison: Comparison, measured: Sequence[Measured]) -> Iterator[str]:
    """One table per text."""
    if "agreement" not in comparison.text_tasks:
        return
    for text in comparison.texts:
        rows = []
        for m in measured:
            found = m.texts["agreement"][text]
            figures = [_estimate(found["kl"], ".3f")]
            figures += [_estimate(found[key], ".1%") for key in ("top1", "flips")]
            rows.append([m.name, *figures, f"{found['seconds']:.0f}"])
        yield _table(
            f"Agreement with {comparison.teacher} on {text} (95 % interval over windows)",
            ["model", "KL, nats", "same first token", "flips", "seconds"],
            rows,
        )


def _needles(options: RetrievalOptions, measured: Sequence[Measured]) -> str:
    samples = ", ".join(map(str, options.samples))
    title = (
        f"{options.task}: share that is right (95 % Wilson interval) of {samples} samples per "
        f"cell over {options.depths} depths, greedy, at most {options.new_tokens} new tokens"
    )
    if options.give_up is not None:
        title += f"; a cell whose first {options.give_up} samples are all wrong has no more"
    rows = []
    for m in measured:
        cells = m.needles[options.task]["cells"]
        seconds = sum(cell["seconds"] for cell in cells)
        rows.append([m.name, *(_cell(cell) for cell in cells), f"{seconds:.0f}"])
    return _table(title, ["model", *map(str, options.lengths), "seconds"], rows)


def _cell(cell: dict[str, Any]) -> str:
    if cell["refused"] is not None:
        return str(cell["refused"])
    return f"{cell['accuracy']:.0%}{_spread(cell['interval'], '.0%')}"


def _estimate(found: dict[str, Any], form: str) -> str:
    return f"{found['value']:{form}}{_spread(found['interval'], form)}"


def _spread(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"


def _notes(comparison: Comparison, measured: Sequence[Measured]) -> Iterator[str]:
    for m in measured:
        machine = m.machine
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        yield (
            f"- {m.name}: {m.spec} on {m.engine} {machine['device']}; {machine['cpu']}, "
            f"{machine['cpu_count']} CPUs; {versions}"
        )
    notes = (note for m in measured for found in m.needles.values() for note in found["notes"])
    yield from (f"- {note}" for note in dict.fromkeys(notes))


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f"{title}\n\n{markdown_table(rows, headers)}"
