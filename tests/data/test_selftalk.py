import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.data import questions, selftalk
from edgekit.data.documents import read_documents
from edgekit.data.quality import flaw_of_answer, flaw_of_question, whole_paragraphs
from edgekit.data.selftalk import SelfTalk, TalkSettings, collect, talk
from edgekit.data.talkfile import TalkFile, Turn
from edgekit.errors import EdgekitError, UsageError
from edgekit.export.pipeline import convert
from edgekit.runtime import Model, load

SETTINGS = TalkSettings(batch=4, max_new_tokens=16, max_question_tokens=16)
PROSE = "A volcano is an opening in the crust of a planet, out of which lava comes. "


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Model:
    out = tmp_path_factory.mktemp("talk") / "bundle"
    convert(tiny_checkpoint("llama"), out, weights="fp32", verify=False, formats=("openvino",))
    return load(out)


def turns(first: int, count: int) -> list[Turn]:
    return [Turn(i, "given", f"Question {i}?", f"Answer {i}.") for i in range(first, first + count)]


def test_batches_depend_on_their_number_alone(model: Model) -> None:
    from_start = SelfTalk(model, SETTINGS).batches(0)
    first, second = next(from_start), next(from_start)
    assert next(SelfTalk(model, SETTINGS).batches(4)) == second
    assert [turn.number for turn in first + second] == list(range(8))
    assert [turn.origin for turn in first] == ["template", "own"] * 2
    assert [turn.question for turn in first] != [turn.question for turn in second]


def test_the_opening_is_the_template_up_to_the_question(model: Model) -> None:
    assert SelfTalk(model, SETTINGS).opening.endswith("<|im_start|>user\n")


def test_given_questions_are_answered_in_order(model: Model) -> None:
    asked = [f"Question {i}?" for i in range(6)]
    batches = list(SelfTalk(model, SETTINGS, asked).batches(0))
    assert [turn.question for batch in batches for turn in batch] == asked
    assert [len(batch) for batch in batches] == [4, 2]


def test_a_model_that_says_nothing_usable(model: Model, tmp_path: Path) -> None:
    settings = TalkSettings(batch=2, max_new_tokens=2, max_question_tokens=2)
    with pytest.raises(EdgekitError, match="20 batches without one usable"):
        talk(model, tmp_path / "a.jsonl", 10, settings)


def test_only_sound_answers_to_new_questions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    said: list[str] = []
    flawed = [turn._replace(flaw="empty") for turn in turns(8, 4)]
    batches = [turns(0, 4), turns(0, 4), flawed, turns(12, 4), turns(16, 4)]
    collect(batches, TalkFile(path, 4), 10, said.append)
    kept = [document.messages[0]["content"] for document in read_documents(path).documents]
    assert kept == [f"Question {i}?" for i in (0, 1, 2, 3, 12, 13, 14, 15, 16, 17)]
    assert said[-1].startswith("[10/10]")
    assert "empty 4" in said[-1]
    assert "asked before 4" in said[-1]


def test_a_full_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    TalkFile(path, 4).append(turns(0, 9))
    file = TalkFile(path, 4)
    collect([turns(8, 4)], file, 5, print)
    assert file.count == 8


def test_a_killed_run_goes_on_with_its_last_batch(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    file = TalkFile(path, 4)
    assert (file.next, file.count) == (0, 0)
    file.append(turns(0, 4))
    whole = path.read_bytes()
    file.append(turns(4, 2))
    with path.open("ab") as torn:
        torn.write(b'{"messages": [{"ro')
    again = TalkFile(path, 4)
    assert (again.next, again.count) == (4, 4)
    assert again.questions == {f"Question {i}?" for i in range(4)}
    assert path.read_bytes() == whole


def test_the_file_is_training_data(tmp_path: Path) -> None:
    TalkFile(tmp_path / "a.jsonl", 4).append(turns(0, 1))
    (document,) = read_documents(tmp_path / "a.jsonl").documents
    assert [message["content"] for message in document.messages] == ["Question 0?", "Answer 0."]


@pytest.mark.parametrize("line", ["{}", '{"text": "a"}', "no"], ids=["keys", "text", "json"])
def test_foreign_files_are_left_alone(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(UsageError, match="line 1 is no conversation of selftalk"):
        TalkFile(path, 4)
    assert path.read_text() == f"{line}\n"


def test_every_place_of_a_template_can_be_filled() -> None:
    sections = questions._sections()
    named = set(re.findall(r"\{(\w+)\}", "".join(sections["templates"])))
    assert named | {"templates", "brief"} == set(sections) | {"number"}
    random = np.random.default_rng(0)
    drawn = [questions.template_question(random) for _ in range(3000)]
    assert not any("{" in question or flaw_of_question(question) for question in drawn)
    assert len(set(drawn)) > 2000


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        pytest.param("4", None, id="short"),
        pytest.param(PROSE + "It is “hot” — naïvely.", None, id="typographic"),
        pytest.param("", "empty", id="empty"),
        pytest.param("See <|im_start|>user", "markup", id="marker"),
        pytest.param("日本語の答え", "not plain text", id="script"),
        pytest.param("a\x07\x07", "not plain text", id="control"),
        pytest.param(PROSE * 3, "repeats itself", id="loop"),
    ],
)
def test_answers(text: str, flaw: str | None) -> None:
    assert flaw_of_answer(text) == flaw


@pytest.mark.parametrize(("text", "flaw"), [("Why?", "too short"), ("a b " * 200, "too long")])
def test_questions(text: str, flaw: str) -> None:
    assert flaw_of_question(text) == flaw


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        pytest.param(f"{PROSE * 3}\n\nThe sec", PROSE * 3, id="paragraph"),
        pytest.param(f"{PROSE * 3}The sec", "", id="one-paragraph"),
        pytest.param("Yes.\n\nThe sec", "", id="too-little"),
        pytest.param(f"{PROSE * 3}Such as:\n\n1. An", "", id="list-to-come"),
        pytest.param(f"{PROSE * 3}\n\n```python\na = 1\n\nb =", "", id="inside-code"),
    ],
)
def test_whole_paragraphs(text: str, kept: str) -> None:
    assert whole_paragraphs(text) == kept.rstrip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--batch", "0"], "batch 0", id="batch"),
        pytest.param(["--questions", "nowhere.txt"], "nowhere.txt: cannot be read", id="missing"),
        pytest.param([], "nobundle", id="bundle"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "a.jsonl"
    assert selftalk.main([str(tmp_path / "nobundle"), "-o", str(out), *arguments])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_records_say_how_they_were_made(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    TalkFile(path, 4).append([Turn(6, "own", "Why is that?", "Because.", cut=True)])
    record = json.loads(path.read_text())
    assert (record["index"], record["origin"], record["cut"]) == (6, "own", True)
