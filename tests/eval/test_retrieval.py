import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.data.needles import KINDS
from edgekit.errors import UsageError
from edgekit.eval.reader import Reader, open_reader
from edgekit.eval.retrieval import RetrievalOptions, retrieval
from edgekit.eval.score import is_right

ESSAY = "The river rose in the night. Nobody slept, and the bridge was watched until dawn. " * 40
# A tiny vocabulary spells every word out: questions alone take 300 to 400 tokens.
LENGTHS = (700, 1000)
Finder = Callable[..., Reader]


def options(task: str = "passkey", **changes: object) -> RetrievalOptions:
    settings = {"lengths": LENGTHS, "samples": (6,), "depths": 3, **changes}
    return RetrievalOptions(task=task, **settings)


@pytest.mark.parametrize("task", KINDS)
def test_a_model_that_finds_the_needle_is_right(finder: Finder, task: str) -> None:
    result = retrieval(finder(), options(task), haystack=ESSAY)
    assert [cell.length for cell in result.cells] == list(LENGTHS)
    for cell in result.cells:
        assert (cell.samples, cell.correct, cell.accuracy) == (6, 6, 1.0)
        assert cell.interval == pytest.approx((0.6097, 1.0), abs=1e-3)
        assert [(d.depth, d.samples, d.correct) for d in cell.depths] == [
            (0.0, 2, 2),
            (0.5, 2, 2),
            (1.0, 2, 2),
        ]


@pytest.mark.parametrize("task", KINDS)
def test_a_model_that_says_something_else_is_wrong(finder: Finder, task: str) -> None:
    result = retrieval(finder(say=lambda _: " no idea 12"), options(task), haystack=ESSAY)
    assert [cell.correct for cell in result.cells] == [0, 0]
    assert result.cells[0].interval == pytest.approx((0, 0.3903), abs=1e-3)


def test_case_does_not_matter(finder: Finder) -> None:
    result = retrieval(finder(say=str.upper), options("niah-3"), haystack=ESSAY)
    assert [cell.correct for cell in result.cells] == [6, 6]


@pytest.mark.parametrize(
    ("task", "output", "begun", "ended"),
    [
        ("passkey", " 12345.", True, True),
        ("passkey", " 12345", None, True),
        ("passkey", " 123456", None, False),
        ("passkey", " 1234 12345", False, False),
        ("passkey", " the number 12345 is it", True, True),
        ("passkey", "", None, False),
        ("niah-1", " 0012345000", True, True),
        ("niah-1", " 1234", None, False),
    ],
)
def test_scores(task: str, output: str, begun: bool | None, ended: bool) -> None:
    assert is_right(task, " 12345", output, ended=False) is begun
    assert is_right(task, " 12345", output) is ended


@pytest.mark.parametrize("kind", ["softmax", "lawcat", "hybrid"])
@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_bundles_answer_side_by_side_as_alone(
    bundles: Callable[[str], Path], kind: str, engine: str, tmp_path: Path
) -> None:
    """Rows of different lengths are padded; neither that nor the batch changes an answer."""
    outputs = []
    for batch in (1, 3):
        reader = open_reader(bundles(kind), logits="last", engine=engine)
        journal = tmp_path / f"{batch}.jsonl"
        asked = options("niah-2", lengths=(900,), samples=(3,), max_new_tokens=8, batch=batch)
        retrieval(reader, asked, haystack=ESSAY, journal=journal)
        records = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
        outputs.append([record["output"] for record in records])
        assert len({record["tokens"] for record in records}) > 1
    assert outputs[0] == outputs[1]
    assert all(outputs[0])


def test_source_answers_as_its_bundle(
    bundles: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    said = []
    for spec in (checkpoint, bundles("softmax")):
        journal = tmp_path / f"{spec.name}.jsonl"
        asked = options("niah-1", lengths=(900,), samples=(4,), max_new_tokens=8)
        retrieval(open_reader(spec, logits="last"), asked, journal=journal)
        lines = journal.read_text().splitlines()[1:]
        said.append([json.loads(line)["output"] for line in lines])
    assert said[0] == said[1]


def test_journal_goes_on_where_it_was_killed(finder: Finder, tmp_path: Path) -> None:
    journal = tmp_path / "deep" / "s.jsonl"
    whole = retrieval(finder(), options(), journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]) + lines[6][:20])
    # What is there already is not answered again: a model that is always wrong shows it.
    resumed = retrieval(finder(say=lambda _: " 0."), options(), journal=journal)
    assert sum(cell.correct for cell in whole.cells) == 12
    assert sum(cell.correct for cell in resumed.cells) == 5
    assert len(journal.read_bytes().splitlines()) == 13


@pytest.mark.parametrize("batch", [1, 4, None])
def test_giving_up_looks_at_the_first_samples_alone(
    finder: Finder, tmp_path: Path, batch: int | None
) -> None:
    asked = options(samples=(9,), batch=batch, give_up=3)
    journal = tmp_path / "s.jsonl"
    wrong = retrieval(finder(say=lambda _: " 0."), asked, journal=journal)
    assert [(cell.samples, cell.correct) for cell in wrong.cells] == [(3, 0), (3, 0)]
    assert wrong.cells[0].interval == pytest.approx((0, 0.5615), abs=1e-3)
    assert len(journal.read_text().splitlines()) == 7
    again = retrieval(finder(), asked, journal=journal)  # nothing is answered that was left
    assert [cell.samples for cell in again.cells] == [3, 3]
    more = retrieval(finder(), options(samples=(9,), batch=batch), journal=journal)
    assert [(cell.samples, cell.correct) for cell in more.cells] == [(9, 6), (9, 6)]
    right = retrieval(finder(), asked)
    assert [(cell.samples, cell.correct) for cell in right.cells] == [(9, 9), (9, 9)]


def test_lengths_and_samples_may_be_added(finder: Finder, tmp_path: Path) -> None:
    journal = tmp_path / "s.jsonl"
    first = retrieval(finder(), options(lengths=(700,), samples=(4,)), journal=journal)
    more = retrieval(finder(), options(), journal=journal)
    assert first.cells[0].samples == 4
    assert [cell.samples for cell in more.cells] == [6, 6]
    fewer = retrieval(finder(), options(lengths=(1000,), samples=(3,)), journal=journal)
    assert [cell.samples for cell in fewer.cells] == [3]
    each = retrieval(finder(), options(samples=(5, 2)), journal=journal)
    assert [cell.samples for cell in each.cells] == [5, 2]
    assert len(journal.read_text().splitlines()) == 13


@pytest.mark.parametrize("depths", [1, 2, 3, 7, 10, 40])
def test_depths_are_reached_alike_and_far_apart(depths: int) -> None:
    asked = options(depths=depths)
    every = [asked.depth(sample) for sample in range(depths)]
    assert len(set(every)) == depths
    assert [asked.depth(sample + depths) for sample in range(depths)] == every
    if depths > 3:
        few = sorted(every[:4])
        assert max(b - a for a, b in zip([0.0, *few], [*few, 1.0], strict=True)) < 0.6


def test_changed_settings_are_refused_with_their_keys(finder: Finder, tmp_path: Path) -> None:
    journal = tmp_path / "s.jsonl"
    retrieval(finder(), options(lengths=(700,)), journal=journal)
    with pytest.raises(UsageError, match=r"\(depths: 3 there, 2 now; seed: 0 there, 1 now\)"):
        retrieval(finder(), options(lengths=(700,), depths=2, seed=1), journal=journal)


def test_damaged_journal_names_its_line(finder: Finder, tmp_path: Path) -> None:
    journal = tmp_path / "s.jsonl"
    retrieval(finder(), options(), journal=journal)
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:2], "{", *lines[3:]]) + "\n")
    with pytest.raises(UsageError, match="line 3 is damaged"):
        retrieval(finder(), options(), journal=journal)


def test_length_over_the_context_is_refused_in_its_cell(finder: Finder) -> None:
    result = retrieval(finder(limit=800), options())
    assert [cell.refused for cell in result.cells] == [None, "over the context limit of 800 tokens"]
    assert result.cells[1].accuracy is None


def test_short_haystack_is_told(finder: Finder) -> None:
    result = retrieval(finder(), options("niah-2"), haystack="One short line.")
    assert re.match("length 700: the haystack is shorter than the text", result.notes[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": (0,)}, "samples 0 given; allowed: 1 or more"),
        ({"samples": (1, 2, 3)}, "3 numbers of samples given for 2 lengths; allowed: one for all"),
        ({"depths": 0}, "depths 0 given"),
        ({"lengths": ()}, "lengths 0 given"),
        ({"max_new_tokens": 0}, "max-new-tokens 0 given"),
        ({"batch": 0}, "batch 0 given"),
        ({"seed": -1}, "seed -1 given"),
        ({"task": "niah-9"}, "task 'niah-9' given; allowed: passkey"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options(**changes)


def test_length_without_room_and_missing_haystack(finder: Finder, tmp_path: Path) -> None:
    journal = tmp_path / "s.jsonl"
    with pytest.raises(UsageError, match="length 100 given for passkey; question, answer and room"):
        retrieval(finder(), options(lengths=(700, 100)), journal=journal)
    assert len(journal.read_text().splitlines()) == 1  # refused before anything was answered
    with pytest.raises(UsageError, match="task niah-2 needs an essay"):
        retrieval(finder(), options("niah-2"))


def test_killed_and_run_again(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; the second run ends with every sample once."""
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1);"
        "from edgekit.eval.reader import open_reader;"
        "from edgekit.eval.retrieval import RetrievalOptions, retrieval;"
        "reader = open_reader(sys.argv[1], logits='last');"
        "asked = RetrievalOptions(task='passkey', lengths=(700,), samples=(24,), batch=1);"
        "retrieval(reader, asked, journal=Path(sys.argv[2]))"
    )
    journal = tmp_path / "s.jsonl"
    command = [sys.executable, "-c", code, str(checkpoint), str(journal)]
    first = subprocess.Popen(command)
    while first.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 5):
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = journal.read_bytes().count(b"\n")
    assert 5 <= before < 25
    subprocess.run(command, check=True)
    records = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert sorted(record["sample"] for record in records) == list(range(24))
