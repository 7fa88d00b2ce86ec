"""What happened at each step: one JSON line, flushed, cut back when a run resumes earlier."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["FILE", "MetricsLog", "continued", "read_metrics", "write_metrics"]

COUNTED = ("step", "tokens", "seconds")  # what a record counts from the start of its stage

FILE = "metrics.jsonl"


class MetricsLog:
    """Append-only records of one run.

    Example:
        >>> with MetricsLog(Path("run"), {1: 10}) as log:    # doctest: +SKIP
        ...     log.write({"stage": 1, "step": 10, "loss": 0.5})
    """

    def __init__(self, folder: Path, done: Mapping[int, int]) -> None:
        """Open `folder`'s log.

        Args:
            folder: of the run.
            done: steps of each stage that a checkpoint holds; later records are dropped.
        """
        self._path = folder / FILE
        kept = [r for r in read_metrics(folder) if r["step"] < done.get(r["stage"], 0)]
        part = self._path.with_suffix(".part")
        part.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(part, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._file.write(_line(record))
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records in `folder`; a last line that a killed run left half written is dropped."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def continued(
    earlier: Sequence[Mapping[str, Any]], later: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The records of two runs as one: the later counts on where the earlier one's stage ended."""
    ends: dict[int, Mapping[str, Any]] = {record["stage"]: record for record in earlier}
    found = [dict(record) for record in earlier]
    for record in later:
        end = ends.get(record["stage"], {})
        shift = {key: end.get(key, 0) for key in COUNTED}
        shift["step"] += bool(end)
        found.append({**record, **{key: record[key] + shift[key] for key in COUNTED}})
    return found


def write_metrics(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write all records at once."""
    (folder / FILE).write_text("".join(_line(r) for r in records), encoding="utf-8")


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
