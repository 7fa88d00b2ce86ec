"""A student at the command line: given to convert, shown by inspect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit.testing import write_tiny_student

Edgekit = Callable[..., Any]
HYBRID = ("lawcat", "softmax", "lawcat")


def test_convert_takes_a_student_and_inspect_shows_it(
    edgekit: Edgekit, checkpoint: Path, tmp_path: Path
) -> None:
    student = write_tiny_student(tmp_path / "student", checkpoint, HYBRID)
    options = ("--student", student, "--format", "onnx", "--no-verify")
    done = edgekit("convert", checkpoint, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert "not distilled" not in done.out
    shown = edgekit("inspect", tmp_path / "out")
    assert "tiny, recipe none, 1.5 M tokens" in shown.out
    assert "lawcat 0, softmax 1, lawcat 2" in shown.out
