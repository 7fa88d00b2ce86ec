"""Progress on stderr: a bar on a terminal, one plain line per step elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

__all__ = ["Progress"]

LINES = 20


class Progress:
    """Shows the steps of a long command; use it as a context and pass `step` on."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._started = time.perf_counter()
        self._bar: RichProgress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = RichProgress(*columns, TimeElapsedColumn(), console=console, transient=True)
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, name: str, number: int, count: int) -> None:
        """Say that step `number` (from 0) of `count`, called `name`, begins.

        Of many steps, plain output tells about LINES.
        """
        if self._bar is not None:
            self._bar.update(self._task, description=name, completed=number, total=count)
            return
        if number and number * LINES // count == (number - 1) * LINES // count:
            return
        seconds = time.perf_counter() - self._started
        print(f"[{number + 1}/{count}] {name} ({seconds:.0f} s)", file=sys.stderr, flush=True)
