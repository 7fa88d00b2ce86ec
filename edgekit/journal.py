"""Scored samples on disk, so that a measurement that was killed goes on where it was.

A JSON Lines file: its first line holds the settings, each later one a record. A line is on the disk
before the next sample begins; half a line at the end, which a kill may leave, is cut off.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError

__all__ = ["Journal", "Record"]

Record = dict[str, Any]


class Journal:
    """Records of one measurement, in memory and, with a path, on disk too.

    Example:
        >>> journal = Journal(Path("out.samples.jsonl"), {"seed": 0})    # doctest: +SKIP
        >>> journal.append({"sample": 0, "correct": True})               # doctest: +SKIP
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Begin, or go on with the records that the file at `path` holds.

        Args:
            path: created if need be; None: nothing is kept.
            settings: JSON-ready; what every record depends on.

        Raises:
            UsageError: if the file was begun with other settings, is damaged or cannot be written.
        """
        self._path = path
        self.records: list[Record] = []
        if path is None:
            return
        lines = _whole_lines(path)
        if not lines:
            self._write({"settings": settings})
            return
        _check_settings(path, lines[0].get("settings"), settings)
        self.records = lines[1:]

    def append(self, record: Record) -> None:
        """Keep `record`; it survives a crash once this returns.

        Raises:
            UsageError: if the file cannot be written.
        """
        self._write(record)
        self.records.append(record)

    def _write(self, line: Record) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as cause:
            raise UsageError(f"{self._path}: cannot be written ({cause.strerror})") from cause


def _whole_lines(path: Path) -> list[Record]:
    """Every line that was written to its end; the rest of the file is cut off."""
    if not path.exists():
        return []
    try:
        with path.open("r+b") as file:
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            file.truncate(len(whole))
    except OSError as cause:
        raise UsageError(f"{path}: cannot be read ({cause.strerror})") from cause
    return [_parsed(path, i, line) for i, line in enumerate(whole.splitlines(), start=1)]


def _parsed(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UsageError(f"{path}: line {number} is damaged; remove the file to begin again")
    return record


def _check_settings(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise UsageError(f"{path}: no journal of measurements; give another output")
    # What JSON makes of the settings, such as lists of tuples, is what was written.
    given = json.loads(json.dumps(wanted))
    keys = [key for key in {**found, **given} if found.get(key) != given.get(key)]
    if keys:
        changes = "; ".join(f"{key}: {found.get(key)} there, {given.get(key)} now" for key in keys)
        raise UsageError(
            f"{path}: begun with other settings ({changes}); "
            "give the same settings, another output, or remove the file"
        )
