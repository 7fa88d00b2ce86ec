"""Several models measured alike: each by the same tasks, on the same texts and samples.

Everything that was measured lies in one folder, `MODEL/TASK.samples.jsonl` and
`MODEL/TASK-TEXT.jsonl`; what is there already is not measured again.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.bundle import MANIFEST
from edgekit.config import dump
from edgekit.data.needles import KINDS, needs_essay
from edgekit.errors import UsageError
from edgekit.eval.agreement import agreement
from edgekit.eval.machine import this_machine
from edgekit.eval.perplexity import perplexity
from edgekit.eval.reader import Logits, Reader, open_reader
from edgekit.eval.retrieval import RetrievalOptions, retrieval
from edgekit.eval.windows import Progress, WindowOptions
from edgekit.journal import Journal

__all__ = ["TEXT_TASKS", "Comparison", "Measured", "compare"]

TEXT_TASKS = ("perplexity", "agreement")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What to compare, and how.

    Attributes:
        models: bundles, students and sources, by the name that the table gives them.
        text_tasks: of `TEXT_TASKS`.
        texts: what those read, by name.
        windows: how it is read.
        needles: one entry per needle task.
        haystack: the essay of `niah-2` and `niah-3`.
        teacher: what `agreement` compares with.
        engine: of every bundle; None: as `edgekit.runtime.load` chooses.
        device: of every model; None: each engine's default.
        threads: CPU threads; None: each engine's choice.
    """

    models: Mapping[str, str]
    text_tasks: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    windows: WindowOptions = field(default_factory=WindowOptions)
    needles: tuple[RetrievalOptions, ...] = ()
    haystack: str | None = None
    teacher: str | None = None
    engine: str | None = None
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check that every task has what it needs.

        Raises:
            UsageError: naming what is missing.
        """
        if not self.models:
            raise UsageError("no model given; give one or more as NAME=SPEC")
        if not self.text_tasks and not self.needles:
            raise UsageError(f"no task given; allowed: {', '.join((*TEXT_TASKS, *KINDS))}")
        if self.text_tasks and not self.texts:
            raise UsageError(f"{self.text_tasks[0]} reads texts; give one or more as NAME=FILE")
        if "agreement" in self.text_tasks and self.teacher is None:
            raise UsageError("agreement needs a teacher; give a source or a bundle")
        lacking = [n.task for n in self.needles if needs_essay(n.task) and self.haystack is None]
        if lacking:
            raise UsageError(f"{lacking[0]} hides its needle in an essay; give a haystack file")

    def open(self, spec: str, logits: Logits) -> Reader:
        """Open a model or the teacher; raises what `open_reader` raises."""
        bundle = (Path(spec) / MANIFEST).is_file()
        return open_reader(
            spec,
            logits=logits,
            engine=self.engine if bundle else None,
            device=self.device,
            threads=self.threads,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The figures of one model, JSON-ready.

    Attributes:
        spec: what it was opened from.
        machine: `edgekit.eval.machine.Machine`.
        texts: by task and text, `Perplexity` or `Agreement` with the seconds that it took.
        needles: by task, `Retrieval`.
    """

    name: str
    spec: str
    engine: str
    machine: dict[str, Any]
    texts: dict[str, dict[str, Any]]
    needles: dict[str, Any]


def compare(
    comparison: Comparison, folder: Path, progress: Progress | None = None
) -> list[Measured]:
    """Measure whatever `folder` does not hold yet.

    Args:
        comparison: models and tasks.
        folder: created if need be.
        progress: called with a step's name, its number and the count of steps.

    Raises:
        EdgekitError: what opening a model or measuring it raises; what was measured stays.
    """
    return [
        _measured(comparison, name, folder / name, _named(progress, name))
        for name in comparison.models
    ]


def _named(progress: Progress | None, name: str) -> Progress:
    if progress is None:
        return lambda step, number, count: None
    return lambda step, number, count: progress(f"{name}: {step}", number, count)


def _measured(comparison: Comparison, name: str, folder: Path, progress: Progress) -> Measured:
    spec = comparison.models[name]
    texts: dict[str, dict[str, Any]] = {}
    needles: dict[str, Any] = {}
    # A bundle is compiled for one kind of logits; the first is let go before the second.
    if comparison.text_tasks:
        reader = comparison.open(spec, "all")
        for task in comparison.text_tasks:
            texts[task] = _on_texts(comparison, task, reader, folder, progress)
    if comparison.needles:
        reader = comparison.open(spec, "last")
    for options in comparison.needles:
        journal = folder / f"{options.task}.samples.jsonl"
        result = retrieval(
            reader, options, haystack=comparison.haystack, journal=journal, progress=progress
        )
        needles[options.task] = dump(result)
    return Measured(
        name=name,
        spec=spec,
        engine=reader.engine,
        machine=dump(this_machine(reader)),
        texts=texts,
        needles=needles,
    )


def _on_texts(
    comparison: Comparison, task: str, reader: Reader, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Perplexity or agreement on every text, by its name."""
    results = {}
    for name, text in comparison.texts.items():
        settings = {
            "task": task,
            "model": reader.identity,
            "engine": reader.engine,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            **dump(comparison.windows),
        }
        if task == "agreement":
            settings["teacher"] = comparison.teacher
        journal = Journal(folder / f"{task}-{name}.jsonl", settings)
        if not journal.records:
            journal.append(_timed(comparison, task, reader, text, progress))
        results[name] = journal.records[0]
    return results


def _timed(
    comparison: Comparison, task: str, reader: Reader, text: str, progress: Progress
) -> dict[str, Any]:
    windows, started = comparison.windows, time.perf_counter()
    if task == "perplexity":
        result = dump(perplexity(reader, text, windows, progress))
    else:
        teacher = comparison.open(str(comparison.teacher), "all")
        result = dump(agreement(reader, teacher, text, windows, progress))
    return {**result, "seconds": round(time.perf_counter() - started, 3)}
