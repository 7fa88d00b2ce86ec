"""The speed of distillation: both stages, every form, the same steps."""

import json
from pathlib import Path

import pytest

from edgekit.distill import speed
from edgekit.distill.speed import main


def test_both_stages_in_every_form(
    teacher_directory: Path,
    text: Path,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(speed, "STEPS", 7)
    out = tmp_path / "speed"
    flags = ["--forms", "reference,torch", "--cpu", "--precision", "fp32", *small]
    assert main([str(teacher_directory), "--data", str(text), "-o", str(out), *flags]) == 0
    found = json.loads((out / "speed.json").read_text())["tokens_per_second"]
    assert {form: set(stages) for form, stages in found.items()} == {
        "reference": {"transfer", "tuning"},
        "torch": {"transfer", "tuning"},
    }
    steps = [step for stages in found.values() for stage in stages.values() for step in stage]
    assert len(steps) == 2 * 2 * (7 - 1 - speed.SKIPPED)
    assert min(steps) > 0
    table = (out / "speed.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert "| transfer | reference |" in table
    assert "| tuning | torch |" in table


def test_bad_input_is_one_line(
    teacher_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(teacher_directory), "--data", str(tmp_path / "no.txt"), "-o", str(tmp_path)]
    assert main([*arguments, "--cpu", "--recipe", "smoke"]) != 0
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no.txt" in message
    with pytest.raises(SystemExit):
        main([*arguments, "--forms", "cuda"])
    assert "'cuda' given; allowed: reference, torch, triton" in capsys.readouterr().err
