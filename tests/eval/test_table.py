import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.eval.table import main

NEEDLES = ("--lengths", "400,600", "--samples", "4", "--depths", "2", "--max-new-tokens", "4")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The capital of France is Paris. Nobody knew. " * 30)
    return path


@pytest.fixture
def short(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A softmax model that cannot read 600 tokens."""
    return tiny_checkpoint("llama")


def test_teacher_and_student_in_one_table(
    short: Path,
    bundles: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = ["--model", f"teacher={short}", "--model", f"lawcat={bundles('lawcat')}"]
    command += ["--task", "perplexity,agreement,passkey,niah-2", "--text", f"prose={text}"]
    command += ["--haystack", str(text), "--teacher", str(short), "--window", "64"]
    command += [*NEEDLES, "-o", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() == printed
    assert "of 4 samples per cell over 2 depths" in printed
    assert "| model | 400 | 600 | seconds |" in printed
    assert "| over the context limit of 512 tokens |" in printed
    assert printed.count("0% (0% to 49%)") == 6
    assert "| 0.000 (0.000 to 0.000) | 100.0% (100.0% to 100.0%) |" in printed
    assert "- lawcat: " in printed
    assert "--task perplexity,agreement,passkey,niah-2" in printed
    written = json.loads((out / "table.json").read_text())
    assert [model["name"] for model in written["models"]] == ["teacher", "lawcat"]
    assert written["models"][0]["texts"]["perplexity"]["prose"]["bits_per_byte"] > 0
    # Nothing is measured twice: even the seconds are the same.
    assert main(command) == 0
    assert capsys.readouterr().out == printed
    assert main([*command, "--window", "32"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "begun with other settings (window: 64 there, 32 now)" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nameless"], "model 'nameless' given; allowed: NAME=VALUE"),
        (["--model", "../a=b"], "model '../a=b' given; allowed: NAME=VALUE"),
        (["--model", "a=b", "--model", "a=c"], "model 'a=c' given; allowed: NAME=VALUE, each name"),
        (["--model", "a=b", "--text", "p=nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--model", "a=b", "--samples", "0"], "samples 0 given; allowed: 1 or more"),
        (["--model", "a=b", "--task", "niah-3"], "niah-3 hides its needle in an essay"),
        (["--model", "a=b", "--task", "perplexity"], "perplexity reads texts; give one or more"),
        (["--model", "a=nowhere"], "nowhere: no such source"),
    ],
    ids=["nameless", "path", "twice", "text", "samples", "haystack", "no-text", "source"],
)
def test_wrong_usage(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--task", "passkey", *arguments, "-o", str(tmp_path / "out")]) in (1, 2)
    assert message in capsys.readouterr().err


def test_agreement_needs_a_teacher(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", "a=b", "--task", "agreement", "--text", f"t={text}", "-o", str(tmp_path)]
    assert main(command) == 2
    assert "agreement needs a teacher" in capsys.readouterr().err


def test_unknown_task_stops_at_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "a=b", "--task", "passkey,telepathy", "-o", "out"])
    assert "'telepathy' given; allowed: perplexity" in capsys.readouterr().err
