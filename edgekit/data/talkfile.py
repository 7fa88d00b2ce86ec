"""Sampled conversations, and the JSONL file that they are collected in."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgekit.errors import UsageError

__all__ = ["TalkFile", "Turn"]


class Turn(NamedTuple):
    """One question and its answer.

    Attributes:
        number: counts all that were sampled, kept or not.
        origin: "own", "template" or "given".
        question: text.
        answer: text; empty before it is sampled.
        cut: the answer did not end within the budget, and its last paragraph was left out.
        flaw: why it should not be kept; None if it should.
    """

    number: int
    origin: str
    question: str
    answer: str = ""
    cut: bool = False
    flaw: str | None = None


class TalkFile:
    """A JSONL file that grows by whole batches and can be taken up again after a kill."""

    def __init__(self, path: Path, batch: int) -> None:
        """Open or make `path`; what its last batch wrote is removed, to be made again.

        Raises:
            UsageError: if a line is none of ours, or the file cannot be read or written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()
            records = [self._parsed(line, number) for number, line in enumerate(lines, 1)]
            last = max((index for index, _ in records), default=0)
            self.next = last - last % batch
            kept = [i for i, (index, _) in enumerate(records) if index < self.next]
            os.truncate(path, sum(len(lines[i]) for i in kept))
        except OSError as cause:
            raise UsageError(f"{path}: cannot be used ({cause.strerror})") from cause
        self.questions = {records[i][1] for i in kept}
        self.count = len(kept)

    def _parsed(self, line: bytes, number: int) -> tuple[int, str]:
        try:
            record = json.loads(line)
            return int(record["index"]), str(record["messages"][0]["content"])
        except (ValueError, LookupError, TypeError) as cause:
            raise UsageError(
                f"{self._path}: line {number} is no conversation of selftalk; give a new file"
            ) from cause

    def append(self, turns: Sequence[Turn]) -> None:
        """Write conversations so that they survive a power cut."""
        lines = [
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": turn.question},
                        {"role": "assistant", "content": turn.answer},
                    ],
                    "index": turn.number,
                    "origin": turn.origin,
                    "cut": turn.cut,
                },
                ensure_ascii=False,
            )
            for turn in turns
        ]
        with self._path.open("ab") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self.count += len(turns)
        self.questions.update(turn.question for turn in turns)
