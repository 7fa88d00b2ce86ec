"""The folder of an unfinished run: one owner, its checkpoints and its records."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekit.distill import checkpoint
from edgekit.distill.metrics import FILE, read_metrics
from edgekit.errors import TrainingError

__all__ = ["claimed", "last_evaluation", "refuse_changes"]

LOCK = "lock"


@contextlib.contextmanager
def claimed(folder: Path, *, resume: bool, force: bool) -> Iterator[None]:
    """The run's folder, for this run alone.

    Raises:
        TrainingError: if another process uses it, or it holds a run that is neither to be resumed
            nor to be forgotten.
    """
    begun = folder.is_dir() and checkpoint.latest(folder) is not None
    if begun and not (resume or force):
        raise TrainingError(
            f"{folder} holds an unfinished run; --resume goes on with it, --force starts again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise TrainingError(f"{folder}: another process is running it") from cause
        if force and not resume:
            checkpoint.forget(folder)
            (folder / FILE).unlink(missing_ok=True)
        try:
            yield
        finally:
            if folder.is_dir() and checkpoint.latest(folder) is None:
                shutil.rmtree(folder)


def last_evaluation(folder: Path) -> dict[str, Any]:
    """The newest figures on the held-out text."""
    found = [r["eval"] for r in read_metrics(folder) if r.get("eval")]
    return dict(found[-1]) if found else {}


def refuse_changes(saved: checkpoint.Checkpoint, fingerprint: dict[str, Any]) -> None:
    """Let a run go on only with what it was begun with.

    Raises:
        TrainingError: naming each key that differs, with both values.
    """
    differing = checkpoint.differing_keys(saved.fingerprint, fingerprint)
    if differing:
        told = "; ".join(f"{key} was {a!r}, is {b!r}" for key, (a, b) in differing.items())
        raise TrainingError(
            f"this run was begun with other settings ({told}); give those, or --force"
        )
