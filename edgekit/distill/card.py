"""The model card of a student, `README.md`: what it is, how it was made, what it can and cannot.

What the student's own files say is taken from them; a person adds `CardNotes`, usually as JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.command import guarded
from edgekit.config import dump, load
from edgekit.distill.metrics import read_metrics
from edgekit.distill.power_law import FEWEST, fit, tokens_without_each
from edgekit.errors import UsageError
from edgekit.markdown import markdown_table
from edgekit.sources.student import Student, ancestor, read_student

__all__ = ["Answer", "CardNotes", "Table", "main", "read_notes", "write_card"]

CARD, CURVE = "README.md", "loss.png"
CURVE_ROWS = 12  # evaluations that the card lists of those in metrics.jsonl
GOALS = (1.5, 1.35, 1.2)  # times the teacher's perplexity
PAPERS = {
    "lawcat": "[LAWCAT](https://arxiv.org/abs/2509.18467)",
    "lolcats": "[LoLCATs](https://arxiv.org/abs/2410.10254)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Measured figures.

    Attributes:
        title: what was measured.
        command: what made the table, as it was typed.
        headers: one per column.
        rows: cells as they are to be shown.
        note: sample counts, intervals, what the reader must know; may be empty.
    """

    title: str
    command: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        """Check that every row fills the columns."""
        for row in self.rows:
            if len(row) != len(self.headers):
                raise UsageError(
                    f"table {self.title!r}: a row of {len(row)} cells given for "
                    f"{len(self.headers)} columns"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the student, and if given its teacher, said to a question."""

    question: str
    student: str
    teacher: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardNotes:
    """What the student's files do not say.

    Attributes:
        source: the base as `edgekit convert` is given it; empty: the base's name.
        base_licence: licence of the teacher.
        licence: licence of the student's own tensors.
        commands: what was typed to make it, in order.
        data_licences: licence of each training file by its name in the manifest.
        hardware: in words, beside the devices that the manifest names.
        tables: measured results.
        answers: plain questions and what was said.
        answers_command: what made them.
        limits: one sentence each, after those that follow from the manifest.
    """

    source: str = ""
    base_licence: str = ""
    licence: str = ""
    commands: tuple[str, ...] = ()
    data_licences: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    tables: tuple[Table, ...] = ()
    answers: tuple[Answer, ...] = ()
    answers_command: str = ""
    limits: tuple[str, ...] = ()


def read_notes(path: Path) -> CardNotes:
    """`CardNotes` from a JSON file.

    Raises:
        UsageError: if it cannot be read, or has a key that is not known.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise UsageError(f"{path}: not readable as JSON ({cause})") from cause
    return load(CardNotes, data, where=str(path), error=UsageError)


def write_card(directory: Path, notes: CardNotes | None = None) -> Path:
    """Write `README.md` into a student's directory, whole or not at all.

    Args:
        directory: a student; `metrics.jsonl` and `loss.png` in it are used where they are there.
        notes: what the files do not say; what is left out is left out of the card too.

    Returns:
        The card.

    Raises:
        SourceError: if `directory` is no sound student.
        OSError: if the card cannot be written.
    """
    student, notes = read_student(directory), notes or CardNotes()
    sections = (
        _about(student, notes),
        _use(student, notes),
        _making(student, notes),
        _data(student, notes),
        _training(student, notes),
        _results(notes),
        _answers(notes),
        _limits(student, notes),
    )
    text = "\n\n".join(part for section in sections for part in section)
    part = directory / f".{CARD}.part"
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, directory / CARD)
    return directory / CARD


def _about(student: Student, notes: CardNotes) -> Iterator[str]:
    manifest = student.manifest
    base, layers = manifest.base, len(manifest.mixers)
    yield f"# {manifest.name}"
    kept = manifest.mixers.count("softmax")
    others = sorted(set(manifest.mixers) - {"softmax"})
    new = " and ".join(PAPERS.get(mixer, mixer) for mixer in others) or "no new"
    yield (
        f"A student of {base['name']}: {layers - kept} of its {layers} attention layers are "
        f"replaced by {new} layers, distilled from the softmax layers that they stand for. "
        + _memory(manifest.mixers)
    )
    count = sum(record.size for record in manifest.files.values())
    yield (
        f"This directory holds only what differs from the base ({count / 1e6:.1f} MB): what the "
        "new layers add, and low-rank differences to the base's matrices. The base is needed too."
    )
    rows = [("base", f"{base['name']} ({base['kind']})"), ("sha256 of the base", base["sha256"])]
    rows += [("revision of the base", base["revision"])] if base.get("revision") else []
    rows += [("licence of the base", notes.base_licence), ("licence of the student", notes.licence)]
    rows += [("layers", _layers(manifest.mixers))]
    rows += [("sha256 of " + name, record.sha256) for name, record in manifest.files.items()]
    yield _table(("", ""), [row for row in rows if row[1]])


def _memory(mixers: Sequence[str]) -> str:
    kept = [str(layer) for layer, mixer in enumerate(mixers) if mixer == "softmax"]
    if not kept:
        return "Its memory does not grow with the length of the text."
    return f"Memory grows with the length of the text only where softmax stays: {', '.join(kept)}."


def _layers(mixers: Sequence[str]) -> str:
    named = {m: [i for i, mixer in enumerate(mixers) if mixer == m] for m in sorted(set(mixers))}
    return "; ".join(f"{m}: {', '.join(map(str, layers))}" for m, layers in named.items())


def _runs(student: Student) -> list[dict[str, Any]]:
    """The runs that made it, the first first."""
    return [*student.manifest.lineage, ancestor(student.manifest)]


def _use(student: Student, notes: CardNotes) -> Iterator[str]:
    source = notes.source or student.manifest.base["name"]
    yield "## Use"
    yield _code(
        f"edgekit convert {source} -o out --student {student.manifest.name} --weights int8",
        'edgekit run out -p "What is the capital of France?"',
    )


def _making(student: Student, notes: CardNotes) -> Iterator[str]:
    yield "## How it was made"
    if notes.commands:
        yield _code(*notes.commands)
    for run in _runs(student):
        yield f"Every setting of the recipe that made {run['name']}:"
        yield _code(json.dumps(run["recipe"], indent=1, ensure_ascii=False), language="json")
    options = {"lawcat": dump(student.manifest.lawcat), "lolcats": dump(student.manifest.lolcats)}
    used = {name: value for name, value in options.items() if name in student.manifest.mixers}
    if used:
        yield "Shape of the new layers:"
        yield _code(json.dumps(used, indent=1), language="json")


def _data(student: Student, notes: CardNotes) -> Iterator[str]:
    runs = _runs(student)
    records = [{"run": run["name"], **record} for run in runs for record in run["data"]]
    if not records:
        return
    yield "## Data"
    for record in records:
        if record.get("name") in notes.data_licences:
            record["licence"] = notes.data_licences[record["name"]]
    keys = list(dict.fromkeys(key for record in records for key in record))
    yield _table(keys, [[_cell(record.get(key, "")) for key in keys] for record in records])


def _training(student: Student, notes: CardNotes) -> Iterator[str]:
    manifest = student.manifest
    yield "## Training"
    if notes.hardware:
        yield f"Hardware: {notes.hardware}"
    headers = ("stage", "steps", "tokens", "wall time", "tokens/s", "last loss", "device")
    rows = [
        (
            str(stage.stage),
            f"{stage.steps:,}",
            f"{stage.tokens:,}",
            _duration(stage.seconds),
            f"{stage.tokens / stage.seconds:,.0f}" if stage.seconds else "-",
            "-" if stage.loss is None else f"{stage.loss:.4g}",
            stage.device,
        )
        for stage in manifest.training
    ]
    yield _table(headers, rows) if rows else "No stage of training was recorded."
    if manifest.versions:
        found = ", ".join(f"{name} {v}" for name, v in sorted(manifest.versions.items()))
        yield f"Versions: {found}."
    if (student.directory / CURVE).is_file():
        yield f"![Loss against tokens]({CURVE})"
    evaluations = [r for r in read_metrics(student.directory) if r.get("eval")]
    if evaluations:
        yield "Held-out figures on the way:"
        yield _table(*_curve(evaluations))
        yield from _outlook(evaluations, manifest.metrics.get("teacher_perplexity"))


def _curve(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of some evenly spread evaluations, the last one among them."""
    step = -(-len(records) // CURVE_ROWS)
    chosen = list(records[::-1][::step])[::-1]
    keys = list(dict.fromkeys(key for record in chosen for key in record["eval"]))
    rows = [
        [str(r["stage"]), f"{r['tokens']:,}", *(_cell(r["eval"].get(key, "")) for key in keys)]
        for r in chosen
    ]
    return ["stage", "tokens of the stage", *keys], rows


def _outlook(records: Sequence[Mapping[str, Any]], teacher: float | None) -> Iterator[str]:
    """What the last stage's points extrapolate to."""
    points = [
        (r["tokens"], r["eval"]["perplexity"])
        for r in records
        if r["stage"] == records[-1]["stage"] and r["tokens"] and "perplexity" in r["eval"]
    ]
    if teacher is None or len(points) <= FEWEST or min(p for _, p in points) <= teacher:
        return
    law = fit(points, teacher)
    yield (
        f"A power law through the {len(points)} points of stage {records[-1]['stage']}, "
        f"ln(perplexity / {teacher:.4g}) = {law.coefficient:.3g} tokens^-{law.exponent:.3g}, "
        "extrapolates to (the range leaves out one point at a time; the rate fell along a cosine "
        "in this run, so these are distances, not promises):"
    )
    rows = []
    for ratio in GOALS:
        low, high = tokens_without_each(points, teacher, ratio)
        rows.append(
            (f"{ratio:g}", _millions(law.tokens(ratio)), f"{_millions(low)} to {_millions(high)}")
        )
    yield _table(("perplexity / teacher's", "tokens of the stage", "range"), rows)


def _millions(tokens: float) -> str:
    return "never" if tokens == float("inf") else f"{tokens / 1e6:,.3g} M"


def _results(notes: CardNotes) -> Iterator[str]:
    if notes.tables:
        yield "## Results"
        yield "Measured with this student; none of it is a paper's result."
    for table in notes.tables:
        yield f"### {table.title}"
        yield _table(table.headers, table.rows)
        yield from (note for note in (table.note,) if note)
        yield _code(table.command)


def _answers(notes: CardNotes) -> Iterator[str]:
    if not notes.answers:
        return
    yield "## Answers to plain questions"
    if notes.answers_command:
        yield _code(notes.answers_command)
    for answer in notes.answers:
        yield f"**{answer.question}**"
        yield _quote("student", answer.student)
        if answer.teacher:
            yield _quote("teacher", answer.teacher)


def _limits(student: Student, notes: CardNotes) -> Iterator[str]:
    manifest = student.manifest
    yield "## Limits"
    tokens = sum(stage.tokens for stage in manifest.training)
    known = [
        f"It fits the base with the sha256 above and no other, {manifest.base['name']} in another "
        "file format included.",
        f"It was trained on {tokens:,} tokens. What the base knows and the training did not touch "
        "may be weaker than in the base.",
    ]
    yield "\n".join(f"- {limit}" for limit in (*known, *notes.limits))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(([_escaped(cell) for cell in row] for row in rows), headers)


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|").replace("\n", " ")


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _code(*lines: str, language: str = "") -> str:
    fence = "```" if not any("```" in line for line in lines) else "````"
    return "\n".join((fence + language, *lines, fence))


def _quote(who: str, text: str) -> str:
    lines = f"*{who}:* {text}".splitlines()
    return "\n".join(f"> {line}".rstrip() for line in lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m edgekit.distill.card STUDENT [--notes FILE.json]`; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the model card of a student.")
    parser.add_argument("student", type=Path, metavar="STUDENT")
    parser.add_argument("--notes", type=Path, metavar="FILE.json", help="see CardNotes")
    args = parser.parse_args(argv)

    def write() -> str:
        return str(write_card(args.student, read_notes(args.notes) if args.notes else None))

    return guarded("card", write)


if __name__ == "__main__":
    sys.exit(main())
