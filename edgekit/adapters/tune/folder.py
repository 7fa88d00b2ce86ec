"""The folder of an unfinished run: one owner, what it was begun with, and its checkpoints."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekit.adapters.tune.recorder import WHOLE
from edgekit.errors import TrainingError

__all__ = ["check_settings", "claimed", "latest_checkpoint"]

LOCK, SETTINGS = "lock", "settings.json"


@contextlib.contextmanager
def claimed(folder: Path, *, resume: bool, force: bool) -> Iterator[None]:
    """The run's folder, for this run alone.

    Raises:
        TrainingError: if another process uses it, or it holds a run that is neither to be resumed
            nor to be forgotten.
    """
    if (folder / SETTINGS).is_file() and not (resume or force):
        raise TrainingError(
            f"{folder} holds an unfinished run; --resume goes on with it, --force starts again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise TrainingError(f"{folder}: another process is running it") from cause
        if not resume:
            _empty(folder)
        try:
            yield
        finally:
            if folder.is_dir() and not (folder / SETTINGS).is_file():
                shutil.rmtree(folder)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep what a run is begun with, or let it go on only with that.

    Raises:
        TrainingError: naming each setting that differs, with both values.
    """
    given = json.loads(json.dumps(settings))  # as JSON has it: lists for tuples
    path = folder / SETTINGS
    if not path.is_file():
        path.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    told = "; ".join(_differences("", found, given))
    if told:
        raise TrainingError(
            f"this run was begun with other settings ({told}); give those, or --force"
        )


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; what a killed run left half written is removed."""
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).is_file():
            whole[int(path.name.split("-")[1])] = path
        else:
            shutil.rmtree(path)
    return whole[max(whole)] if whole else None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _differences(where: str, found: Any, given: Any) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(given, dict):
        for key in {**found, **given}:
            inner = f"{where}.{key}" if where else key
            yield from _differences(inner, found.get(key), given.get(key))
    elif found != given:
        yield f"{where} was {found!r}, is {given!r}"
