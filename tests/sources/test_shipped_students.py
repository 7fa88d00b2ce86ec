"""Students that ship with edgekit: found by name, sound, small, and with a card."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit import students
from edgekit.errors import SourceError
from edgekit.sources import open_source
from edgekit.sources.builtin import BUILT_IN
from edgekit.sources.student import apply_student, find_student, open_model, read_student
from edgekit.testing import write_tiny_student

Tiny = Callable[..., Path]
LARGEST = 16_000_000  # bytes of a student, card and curves included
LAWCAT = ("lawcat",) * 3


@pytest.mark.parametrize("name", students.student_names())
def test_a_shipped_student(name: str) -> None:
    student = read_student(name)
    manifest, directory = student.manifest, student.directory
    assert manifest.name == name
    assert sum(path.stat().st_size for path in directory.rglob("*")) <= LARGEST
    assert not [path for path in directory.iterdir() if path.is_dir()]  # package data is flat
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert str(manifest.base["name"]) in card
    assert str(manifest.base["sha256"]) in card
    assert manifest.training
    keys = {model.name: key for key, model in BUILT_IN.items()}
    source = open_source(keys[str(manifest.base["name"])])
    config, _ = apply_student(source, student)
    assert config.mixers == manifest.mixers


@pytest.fixture
def shelf(tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of students in place of the package's: one student, and what is none."""
    folder = tmp_path / "students"
    write_tiny_student(folder / "lawcat", tiny_checkpoint("llama"), LAWCAT, name="shipped")
    (folder / "__pycache__").mkdir()
    monkeypatch.setattr(students, "HERE", folder)
    return folder


def test_found_by_name(shelf: Path) -> None:
    assert students.student_names() == ["lawcat"]
    assert read_student("lawcat").directory == read_student("LAWCAT").directory == shelf / "lawcat"
    for other in ("lolcats", "../students/lawcat", ".", "__pycache__"):
        assert students.student_path(other) is None
    with pytest.raises(SourceError, match=r"lolcats: no such student; .* edgekit \(lawcat\)"):
        read_student("lolcats")


def test_a_student_on_disk_comes_first_and_a_bundle_does_not(
    shelf: Path, tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`convert -o lawcat --student lawcat`, twice: OUT must not hide the student."""
    monkeypatch.chdir(tmp_path)
    Path("lawcat").mkdir()
    (Path("lawcat") / "edgekit.json").touch()
    assert find_student("lawcat") == shelf / "lawcat"
    (Path("lawcat") / "edgekit.json").unlink()
    Path("lawcat").rmdir()
    write_tiny_student(Path("lawcat"), tiny_checkpoint("llama"), LAWCAT, name="mine")
    assert read_student("lawcat").manifest.name == "mine"


def test_a_model_on_disk_is_opened_before_a_student_of_that_name(
    shelf: Path, tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_checkpoint("llama")
    assert open_model("lawcat", base=base)[1].mixers == LAWCAT
    Path("lawcat").symlink_to(base)
    assert open_model("lawcat")[1].mixers == ("softmax",) * 3
