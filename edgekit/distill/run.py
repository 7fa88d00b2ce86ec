"""`distill`: a transformer and text in, a student out; whole, or resumable where it was."""

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgekit import __version__
from edgekit.config import dump
from edgekit.distill import checkpoint, recipe
from edgekit.distill.assembly import Assembly, Settings
from edgekit.distill.folder import claimed, last_evaluation, refuse_changes
from edgekit.distill.loop import Outcome, Run, train
from edgekit.distill.metrics import continued, read_metrics, write_metrics
from edgekit.distill.plot import draw_losses
from edgekit.distill.processes import Processes
from edgekit.distill.transfer import TransferStage
from edgekit.distill.tuning import TuningStage, inject_pairs
from edgekit.errors import UsageError
from edgekit.models.precision import choose_precision
from edgekit.sources.student import (
    StageRecord,
    Student,
    StudentManifest,
    ancestor,
    lowrank_pairs,
    write_student,
)
from edgekit.staging import refuse_existing, staged

__all__ = ["DistillReport", "Settings", "distill"]

Progress = Callable[[str, int, int], None]
PACKAGES = ("torch", "peft", "accelerate", "transformers")
LOCK = "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillReport:
    """What `distill` did.

    Attributes:
        out: the student's directory, or that of the unfinished run.
        finished: whether the student is there; False when `stop_after` ended the run.
        training: a record of each stage that is over.
        metrics: the last figures on the held-out text.
    """

    out: Path
    finished: bool
    training: tuple[StageRecord, ...]
    metrics: dict[str, Any]


def distill(
    source: str | Path,
    out: str | Path,
    plan: recipe.Recipe,
    *,
    data: Sequence[str | Path] = (),
    haystack: Path | None = None,
    init: str | Path | None = None,
    settings: Settings | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> DistillReport:
    """Distil a transformer into a student.

    Args:
        source: the teacher, as for `convert`.
        out: the student directory to make; `OUT.run` beside it holds the run until it is done.
        plan: `recipe.load_recipe` gives it.
        data: text, conversations, data sets; see `edgekit.data.read_corpus`.
        haystack: a text for needles of the kinds `niah-2` and `niah-3`.
        init: an earlier student of the same teacher and mixers to start from.
        settings: how to run.
        resume: go on with an unfinished run.
        force: replace the student at `out`, and forget an unfinished run unless `resume`.
        progress: called with a step's name, its number and the count of steps.

    Returns:
        Where the student is, and how its training went.

    Raises:
        UsageError: for an argument that is not allowed.
        SourceError: if the teacher or `init` cannot be read or do not fit together.
        BundleError: if `out` exists or cannot be written.
        TrainingError: if a loss is not finite, or the run may not be resumed.
    """
    started = time.monotonic()
    choice = settings or Settings()
    precision = choose_precision(choice.precision, cpu=choice.cpu)
    processes = Processes(precision, cpu=choice.cpu, shard=choice.shard)
    final = Path(os.path.realpath(out))
    refuse_existing(final, force, "student")
    folder = final.with_name(f"{final.name}.run")
    with contextlib.ExitStack() as stack:
        if processes.rank == 0:
            stack.enter_context(claimed(folder, resume=resume, force=force))
        processes.wait()
        work = Assembly.open(source, plan, data, haystack, init, processes, progress)
        saved = checkpoint.latest(folder) if resume else None
        if saved:
            refuse_changes(saved, work.fingerprint)
        elif choice.finish:
            raise UsageError(f"{folder}: there is no run to finish; --finish goes with --resume")
        run = _run(work, folder, choice, saved, started, progress)
        finished = _stages(work, run, saved)
        earlier = () if work.init is None else work.init.manifest.training
        records = (*earlier, *(StageRecord(**record) for record in run.history))
        metrics = last_evaluation(folder)
        if finished:
            metrics = _measured(work, choice)  # by all: sharded weights need every process
        if finished and run.leads:
            _write(work, final, folder, records, metrics, choice, force=force)
    return DistillReport(
        out=final if finished else folder, finished=finished, training=records, metrics=metrics
    )


def _stages(work: Assembly, run: Run, saved: checkpoint.Checkpoint | None) -> bool:
    """Both stages, from where `saved` was; returns whether they came to their end."""
    plan, autocast = work.plan, work.processes.autocast
    at = saved.stage if saved else 1
    if at == 1 and plan.transfer.steps:
        stage = TransferStage(work.teacher, work.student, plan.transfer, autocast)
        outcome = train(stage, plan.transfer, work.mixtures[1].batch, run, saved)
        if not outcome.finished and not run.finish:
            return False
        run.history.append(_record(1, outcome, run))
        saved = None
    given = {} if work.init is None else lowrank_pairs(work.init)
    if plan.tuning.steps or given:
        inject_pairs(work.student, plan.tuning, given, plan.seed)
    if plan.tuning.steps and not (run.finish and at == 1):
        tuning = TuningStage(work.teacher, work.student, plan.tuning, autocast)
        outcome = train(tuning, plan.tuning, work.mixtures[2].batch, run, saved)
        if not outcome.finished and not run.finish:
            return False
        run.history.append(_record(2, outcome, run))
    return True


def _run(
    work: Assembly,
    folder: Path,
    choice: Settings,
    saved: checkpoint.Checkpoint | None,
    started: float,
    progress: Progress | None,
) -> Run:
    """What the stages share."""
    measure = work.held_out(choice)
    evaluate = None if measure is None else lambda: {"perplexity": measure(work.student)}
    return Run(
        folder=folder,
        processes=work.processes,
        fingerprint=work.fingerprint,
        seed=work.plan.seed,
        checkpoint_seconds=choice.checkpoint_seconds,
        stop_after=choice.stop_after,
        finish=choice.finish,
        evaluate=evaluate,
        evaluate_tokens=choice.evaluate_tokens,
        progress=progress,
        history=list(saved.history) if saved else [],
        started=started,
    )


def _record(stage: int, outcome: Outcome, run: Run) -> dict[str, Any]:
    return {
        "stage": stage,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": round(outcome.seconds, 1),
        "loss": outcome.loss,
        "device": run.processes.description,
    }


def _measured(work: Assembly, choice: Settings) -> dict[str, Any]:
    """Figures of the student as it is written, beside its teacher's."""
    measure = work.held_out(choice)
    if measure is None:
        return {}
    return {"perplexity": measure(work.student), "teacher_perplexity": measure(work.teacher)}


def _write(
    work: Assembly,
    final: Path,
    folder: Path,
    records: tuple[StageRecord, ...],
    metrics: dict[str, Any],
    choice: Settings,
    *,
    force: bool,
) -> None:
    """The student, whole or not at all; then the run's folder goes."""
    config = work.student.config
    files = next(iter(work.mixtures.values())).files
    manifest = StudentManifest(
        name=final.name,
        base=work.source.identity,
        mixers=config.mixers,
        lawcat=config.lawcat,
        lolcats=config.lolcats if "lolcats" in config.mixers else None,
        recipe=dump(work.plan),
        data=tuple(dump(file) for file in files),
        lineage=_lineage(work.init),
        training=records,
        metrics=metrics,
        versions=_versions(),
    )
    with staged(final, force=force, kind="student") as directory:
        write_student(directory, manifest, work.tensors(), dtype=choice.dtype)
        earlier = [] if work.init is None else read_metrics(work.init.directory)
        curve = continued(earlier, read_metrics(folder))
        write_metrics(directory, curve)
        with contextlib.suppress(ModuleNotFoundError):  # without matplotlib there is no curve
            teacher = metrics.get("teacher_perplexity")
            draw_losses(curve, directory / "loss.png", teacher=teacher)
    shutil.rmtree(folder)


def _lineage(init: Student | None) -> tuple[dict[str, Any], ...]:
    return () if init is None else (*init.manifest.lineage, ancestor(init.manifest))


def _versions() -> dict[str, str]:
    found = {"edgekit": __version__, "python": platform.python_version()}
    return found | {package: metadata.version(package) for package in PACKAGES}
