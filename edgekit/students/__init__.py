"""Trained students that ship with edgekit: one directory each, whose name is the student's."""

from pathlib import Path

from edgekit.staging import MARKERS

__all__ = ["student_names", "student_path"]

HERE = Path(__file__).parent


def student_names() -> list[str]:
    """The students that ship with edgekit, by name."""
    return sorted(path.parent.name for path in HERE.glob(f"*/{MARKERS['student']}"))


def student_path(name: str) -> Path | None:
    """The directory of the student `name`; None if no such one ships with edgekit."""
    return HERE / name if name in student_names() else None
