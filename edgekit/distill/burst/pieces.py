"""Files cut into pieces that are named by their sha256, and put together again.

Needs the standard library alone, since the far machine runs it before anything is installed.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgekit.errors import TrainingError

__all__ = ["CHECKPOINTS", "SOFTWARE", "Entry", "Plan", "Result", "cut", "join", "keep", "newest"]

SOFTWARE = "software.zip"  # the packages among the files of a plan
CHECKPOINTS = "checkpoint-*.safetensors"  # numbers have leading zeros: names sort as they do


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file: its path below the folder that it belongs in, and the names of its pieces."""

    path: str
    pieces: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a burst needs and does.

    Attributes:
        name: of the student.
        python: minor version that the packages are for, such as "3.12".
        arguments: of `edgekit distill`, with files as they are called there.
        files: to be put together before it starts.
        run: records and checkpoint to go on from, in this order; empty for a new run.
        parts: names of the pieces in each part.
    """

    name: str
    python: str
    arguments: tuple[str, ...]
    files: tuple[Entry, ...]
    run: tuple[Entry, ...]
    parts: dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a burst left: the files of the student, or records and newest checkpoint of its run."""

    name: str
    finished: bool
    files: tuple[Entry, ...]


def cut(file: Path, size: int) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each piece of `file`, `size` bytes each but the last.

    Raises:
        TrainingError: if the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            while data := stream.read(size):
                yield hashlib.sha256(data).hexdigest(), data
    except OSError as cause:
        raise TrainingError(f"{file}: cannot be read ({cause.strerror})") from cause


def keep(name: str, data: bytes, store: Path) -> None:
    """Write a piece into `store`, whole or not at all.

    Raises:
        TrainingError: if it is damaged.
    """
    if hashlib.sha256(data).hexdigest() != name:
        raise TrainingError(f"piece {name[:12]}: damaged on its way; send its part again")
    part = store / f"{name}.part"
    part.write_bytes(data)
    os.replace(part, store / name)


def join(entry: Entry, store: Path, out: Path) -> Path:
    """Put a file together below `out`, whole or not at all.

    Raises:
        TrainingError: if a piece is missing or damaged, or the path leads out of `out`.
    """
    inside = PurePosixPath(entry.path)
    if inside.is_absolute() or ".." in inside.parts:
        raise TrainingError(f"{entry.path!r} leads outside {out}; refused")
    final = out / inside
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_name(f".{final.name}.part")
    with part.open("wb") as stream:
        for name in entry.pieces:
            stream.write(_piece(store / name))
    os.replace(part, final)
    return final


def _piece(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise TrainingError(f"{path}: missing ({cause.strerror}); copy it again") from cause
    if hashlib.sha256(data).hexdigest() != path.name:
        path.unlink()
        raise TrainingError(f"{path}: damaged, and removed; copy it again")
    return data


def newest(run: Path) -> Path | None:
    """The newest checkpoint in the folder of a run; None if there is none."""
    return max(run.glob(CHECKPOINTS), default=None)
