"""The model card: every fact of the student's files and notes is in it, and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.distill.card import Answer, CardNotes, Table, read_notes, write_card
from edgekit.errors import SourceError, UsageError
from edgekit.sources.student import ancestor, read_student, write_student
from edgekit.testing import write_tiny_student

Tiny = Callable[..., Path]
TABLE = Table(
    title="Passkey",
    command="edgekit eval out --task passkey --lengths 1024",
    headers=("model", "1024"),
    rows=(("teacher", "99 %"), ("student", "91 % [84, 95]")),
    note="100 samples a cell, Wilson intervals.",
)
NOTES = CardNotes(
    source="smollm2-135m-instruct",
    base_licence="Apache-2.0",
    licence="Apache-2.0",
    commands=("edgekit distill tiny-llama -o s --data a.txt --recipe smoke",),
    data_licences={"a|b.txt": "CC0", "not-used.txt": "MIT"},
    hardware="one H100, 21 minutes",
    tables=(TABLE,),
    answers=(Answer(question="Who | what?", student="A model.\n\nSmall.", teacher="Me."),),
    answers_command="edgekit run out -p QUESTION --temperature 0",
    limits=("Knows no Finnish.",),
)


@pytest.fixture
def directory(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A student with data records, metrics and a curve."""
    made = write_tiny_student(
        tmp_path / "s", tiny_checkpoint("llama"), ("lawcat", "softmax", "lawcat"), conv_size=3
    )
    student = read_student(made)
    data = {"name": "a|b.txt", "tokens": 1234567, "sha256": "e" * 64}
    tensors = {name: student.tensors.tensor(name) for name in student.tensors}
    recipe = {"name": "smoke", "transfer": {"lr": 0.01}}
    manifest = replace(student.manifest, data=(data,), recipe=recipe, versions={"torch": "2.13"})
    write_student(made, manifest, tensors)
    records = [
        {"stage": 1, "step": i, "tokens": 100 * i, "loss": 1.0, "eval": {"perplexity": 99.0 - i}}
        for i in range(30)
    ]
    (made / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (made / "loss.png").write_bytes(b"png")
    return made


def card(directory: Path, notes: CardNotes | None = None) -> str:
    path = write_card(directory, notes)
    assert path == directory / "README.md"
    assert not list(directory.glob(".*"))
    return path.read_text(encoding="utf-8")


def test_every_run_that_made_it_is_told(directory: Path) -> None:
    student = read_student(directory)
    tensors = {name: student.tensors.tensor(name) for name in student.tensors}
    first = {**ancestor(student.manifest), "name": "first", "recipe": {"name": "older"}}
    write_student(directory, replace(student.manifest, lineage=(first,)), tensors)
    text = card(directory)
    assert text.index("the recipe that made first:") < text.index("the recipe that made tiny:")
    assert '"name": "older"' in text
    assert "| first | a\\|b.txt" in text


def test_curve_is_extrapolated_where_the_teacher_was_measured(directory: Path) -> None:
    assert "extrapolates" not in card(directory)
    student = read_student(directory)
    tensors = {name: student.tensors.tensor(name) for name in student.tensors}
    measured = {"perplexity": 70.0, "teacher_perplexity": 50.0}
    write_student(directory, replace(student.manifest, metrics=measured), tensors)
    text = card(directory)
    assert "A power law through the 29 points of stage 1" in text
    assert "| perplexity / teacher's | tokens of the stage | range |" in text
    assert "| 1.35 | " in text


def test_what_the_files_say(directory: Path) -> None:
    text = card(directory)
    manifest = read_student(directory).manifest
    record = manifest.files["student.safetensors"]
    for fact in (
        f"# tiny\n\nA student of {manifest.base['name']}: 2 of its 3 attention layers",
        "arxiv.org/abs/2509.18467",
        "grows with the length of the text only where softmax stays: 1.",
        manifest.base["sha256"],
        record.sha256,
        f"({record.size / 1e6:.1f} MB)",
        "lawcat: 0, 2; softmax: 1",
        f"edgekit convert {manifest.base['name']} -o out --student tiny",
        '"lr": 0.01',
        '"conv_size": 3',
        f"| a\\|b.txt | 1,234,567 | {'e' * 64} |\n",
        "| 1 | 9 | 1,200,000 | 0 min 02 s | 800,000 | 0.25 | none |",
        "Versions: torch 2.13.",
        "![Loss against tokens](loss.png)",
        "| 1 | 2,900 | 70 |",
        "trained on 1,500,000 tokens",
    ):
        assert fact in text
    assert "## Results" not in text
    assert "## Answers" not in text


def test_what_a_person_adds(directory: Path) -> None:
    text = card(directory, NOTES)
    for fact in (
        "edgekit convert smollm2-135m-instruct -o out --student tiny",
        "| licence of the base | Apache-2.0 |",
        "| licence of the student | Apache-2.0 |",
        "```\nedgekit distill tiny-llama -o s --data a.txt --recipe smoke\n```",
        "Hardware: one H100, 21 minutes",
        "| name | tokens | sha256 | licence |",
        f"| a\\|b.txt | 1,234,567 | {'e' * 64} | CC0 |\n",
        "### Passkey\n\n| model | 1024 |\n| --- | --- |\n| teacher | 99 % |",
        "100 samples a cell, Wilson intervals.\n\n```\nedgekit eval out --task passkey",
        "**Who | what?**\n\n> *student:* A model.\n>\n> Small.\n\n> *teacher:* Me.",
        "- Knows no Finnish.",
    ):
        assert fact in text


def test_every_table_is_a_table(directory: Path) -> None:
    """All rows of a table have as many cells as its head, whatever is in them."""
    text = card(directory, NOTES).replace("\\|", "/")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 5
    for lines in blocks:
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) == set("| -")


def test_the_curve_is_thinned_and_ends_with_the_last(directory: Path) -> None:
    text = card(directory)
    rows = [
        line for line in text.splitlines() if line.startswith("| 1 | ") and line.count("|") == 4
    ]
    assert len(rows) == 10
    assert rows[-1] == "| 1 | 2,900 | 70 |"


def test_a_bare_student(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    directory = write_tiny_student(tmp_path / "s", tiny_checkpoint("llama"), ("lawcat",) * 3)
    text = card(directory)
    assert "Its memory does not grow with the length of the text." in text
    assert "loss.png" not in text
    assert "## Data" not in text
    assert "licence" not in text


def test_writing_again_gives_the_same_card_and_a_sound_student(directory: Path) -> None:
    assert card(directory, NOTES) == card(directory, NOTES)
    read_student(directory)


def test_notes_from_json(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text(
        json.dumps({"limits": ["One."], "answers": [{"question": "a", "student": "b"}]})
    )
    notes = read_notes(path)
    assert notes.limits == ("One.",)
    assert notes.answers == (Answer(question="a", student="b"),)


ROW: dict[str, Any] = {"title": "t", "command": "c", "headers": ["a", "b"], "rows": [["1"]]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "notes.json: not readable as JSON"),
        ('{"colour": 1}', "unknown key 'colour'"),
        (json.dumps({"tables": [ROW]}), "a row of 1 cells given for 2 columns"),
        (None, "No such file"),
    ],
    ids=["broken", "unknown-key", "short-row", "missing"],
)
def test_notes_that_cannot_be_used(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "notes.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=said):
        read_notes(path)


def test_a_directory_that_is_no_student(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not an edgekit student"):
        write_card(tmp_path)
    assert list(tmp_path.iterdir()) == []
