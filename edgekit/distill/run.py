"""`distill`: a transformer and text in, a student out; whole, or resumable where it was."""

import contextlib
import fcntl
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from edgekit import __version__
from edgekit.bundle import staged
from edgekit.config import dump
from edgekit.data import Mixture, NeedleShare, open_data
from edgekit.distill import checkpoint, recipe
from edgekit.distill.build import student_config, student_over
from edgekit.distill.heldout import perplexity
from edgekit.distill.loop import Outcome, Run, train
from edgekit.distill.metrics import FILE, read_metrics
from edgekit.distill.plot import draw_losses
from edgekit.distill.processes import Precision, Processes, choose_precision
from edgekit.distill.transfer import TransferStage, new_parameters
from edgekit.distill.tuning import TuningStage, inject_pairs, pairs
from edgekit.errors import TrainingError, UsageError
from edgekit.models.decoder import Decoder
from edgekit.runtime.text import Tokenizer
from edgekit.sources import Source, open_source
from edgekit.sources.student import (
    StageRecord,
    Student,
    StudentManifest,
    lowrank_pairs,
    lowrank_tensors,
    read_student,
    write_student,
)

__all__ = ["DistillReport", "Settings", "distill"]

Progress = Callable[[str, int, int], None]
PACKAGES = ("torch", "peft", "accelerate", "transformers")
LOCK = "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to run a recipe: nothing here changes what is learned, but for rounding.

    Attributes:
        precision: of matrix products; `auto` takes bf16 where the hardware has it.
        cpu: use the CPU where there is a GPU too.
        held_out: text that the student is measured on as it learns.
        held_out_tokens: of that text, from its beginning.
        evaluate_tokens: trained tokens between two measurements; None: at a stage's end only.
        checkpoint_seconds: between checkpoints.
        stop_after: seconds after which a checkpoint is written and the run ends, to be resumed.
        dtype: of the student's file.
    """

    precision: Precision | Literal["auto"] = "auto"
    cpu: bool = False
    held_out: Path | None = None
    held_out_tokens: int = 8192
    evaluate_tokens: int | None = None
    checkpoint_seconds: float = 120.0
    stop_after: float | None = None
    dtype: Literal["float16", "float32"] = "float16"


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
        data: text, conversations, data sets; see `edgekit.data.open_data`.
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
    choice = settings or Settings()
    processes = Processes(choose_precision(choice.precision, cpu=choice.cpu), cpu=choice.cpu)
    final = Path(out)
    folder = final.with_name(f"{final.name}.run")
    with contextlib.ExitStack() as stack:
        if processes.rank == 0:
            stack.enter_context(_claimed(folder, resume=resume, force=force))
        processes.wait()
        work = _Work.open(source, plan, data, haystack, init, processes, progress)
        saved = checkpoint.latest(folder) if resume else None
        if saved:
            _refuse_changes(saved, work.fingerprint)
        run = work.run(folder, choice, saved, progress)
        finished = _stages(work, run, saved)
        records = tuple(StageRecord(**record) for record in run.history)
        metrics = _last_evaluation(folder)
        if finished and run.leads:
            _write(work, final, folder, records, metrics, choice, force=force)
    return DistillReport(
        out=final if finished else folder, finished=finished, training=records, metrics=metrics
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What a distillation reads and changes."""

    source: Source
    plan: recipe.Recipe
    teacher: Decoder
    student: Decoder
    init: Student | None
    tokenizer: Tokenizer
    mixtures: dict[int, Mixture]
    fingerprint: dict[str, Any]
    processes: Processes

    @classmethod
    def open(
        cls,
        source: str | Path,
        plan: recipe.Recipe,
        data: Sequence[str | Path],
        haystack: Path | None,
        init: str | Path | None,
        processes: Processes,
        progress: Progress | None,
    ) -> "_Work":
        opened = open_source(source)
        config = student_config(opened.config, plan)
        earlier = None if init is None else _earlier(init, opened, config.mixers, plan)
        tokenizer = Tokenizer(opened.directory)
        mixtures = _mixtures(opened, plan, data, haystack, tokenizer, progress)
        teacher = Decoder.from_store(opened.config, opened.weights).to(processes.device)
        teacher.requires_grad_(False)
        trained = (
            None if earlier is None else {n: earlier.tensors.tensor(n) for n in earlier.tensors}
        )
        fingerprint = {
            "recipe": dump(plan),
            "teacher": opened.identity["sha256"],
            "data": {f.name: f.sha256 for m in mixtures.values() for f in m.files},
            "init": None if earlier is None else dump(earlier.manifest.files),
            "precision": processes.precision,
        }
        return cls(
            source=opened,
            plan=plan,
            teacher=teacher,
            student=student_over(teacher, config, trained),
            init=earlier,
            tokenizer=tokenizer,
            mixtures=mixtures,
            fingerprint=fingerprint,
            processes=processes,
        )

    def run(
        self,
        folder: Path,
        choice: Settings,
        saved: checkpoint.Checkpoint | None,
        progress: Progress | None,
    ) -> Run:
        """What the stages share."""
        return Run(
            folder=folder,
            processes=self.processes,
            fingerprint=self.fingerprint,
            seed=self.plan.seed,
            checkpoint_seconds=choice.checkpoint_seconds,
            stop_after=choice.stop_after,
            evaluate=self._evaluation(choice),
            evaluate_tokens=choice.evaluate_tokens,
            progress=progress,
            history=list(saved.history) if saved else [],
        )

    def _evaluation(self, choice: Settings) -> Callable[[], dict[str, float]] | None:
        if choice.held_out is None:
            return None
        try:
            text = choice.held_out.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            raise UsageError(f"{choice.held_out}: cannot be read ({cause}); give UTF-8") from cause
        ids = self.tokenizer.encode(text, add_special_tokens=False)[: choice.held_out_tokens]
        window = min(512, len(ids))
        if window < 2:
            raise UsageError(f"{choice.held_out}: {len(ids)} tokens; give at least 2")
        tokens = torch.from_numpy(ids).to(self.processes.device)
        autocast = self.processes.autocast
        return lambda: {"perplexity": perplexity(self.student, tokens, autocast, window=window)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the student's file holds."""
        found: dict[str, torch.Tensor] = {}
        for layer, mixer in enumerate(self.student.config.mixers):
            if mixer != "softmax":
                found |= new_parameters(self.student, layer)
        return found | lowrank_tensors(pairs(self.student))


def _stages(work: _Work, run: Run, saved: checkpoint.Checkpoint | None) -> bool:
    """Both stages, from where `saved` was; returns whether they came to their end."""
    plan, autocast = work.plan, work.processes.autocast
    at = saved.stage if saved else 1
    if at == 1 and plan.transfer.steps:
        stage = TransferStage(work.teacher, work.student, plan.transfer, autocast)
        outcome = train(stage, plan.transfer, work.mixtures[1].batch, run, saved)
        if not outcome.finished:
            return False
        run.history.append(_record(1, outcome, run))
        saved = None
    given = {} if work.init is None else lowrank_pairs(work.init)
    if plan.tuning.steps or given:
        inject_pairs(work.student, plan.tuning, given, plan.seed)
    if plan.tuning.steps:
        tuning = TuningStage(work.teacher, work.student, plan.tuning, autocast)
        outcome = train(tuning, plan.tuning, work.mixtures[2].batch, run, saved)
        if not outcome.finished:
            return False
        run.history.append(_record(2, outcome, run))
    return True


def _record(stage: int, outcome: Outcome, run: Run) -> dict[str, Any]:
    return {
        "stage": stage,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": round(outcome.seconds, 1),
        "loss": outcome.loss,
        "device": run.processes.description,
    }


def _mixtures(
    source: Source,
    plan: recipe.Recipe,
    data: Sequence[str | Path],
    haystack: Path | None,
    tokenizer: Tokenizer,
    progress: Progress | None,
) -> dict[int, Mixture]:
    """The rows of each stage that has steps."""
    essay = None if haystack is None else _essay(haystack)
    stages = {1: plan.transfer, 2: plan.tuning}
    if not any(stage.steps for stage in stages.values()):
        raise UsageError("transfer.tokens and tuning.tokens are both 0: nothing to do")
    if not source.config.eos_token_ids:
        raise UsageError(f"{source.name} has no end-of-text token, which parts the documents")
    mixtures = {}
    for number, stage in stages.items():
        if stage.steps:
            share = NeedleShare(
                share=stage.needles.share,
                kinds=stage.needles.kinds,
                lengths=stage.needles.lengths,
                essay=essay,
            )
            mixtures[number] = open_data(
                data,
                tokenizer,
                length=stage.length,
                seed=plan.seed + number,  # stage 2 reads in another order
                eos=source.config.eos_token_ids[0],
                chat_loss=plan.chat_loss,
                needles=share if stage.needles.share else None,
                progress=progress,
            )
    return mixtures


def _essay(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise UsageError(f"haystack {path}: cannot be read ({cause}); give UTF-8") from cause


def _earlier(
    init: str | Path, source: Source, mixers: tuple[str, ...], plan: recipe.Recipe
) -> Student:
    """The student to start from, if it fits."""
    student = read_student(init)
    manifest = student.manifest
    if manifest.base["sha256"] != source.identity["sha256"]:
        raise UsageError(f"init {init}: made from {manifest.base['name']}, not {source.name}")
    options = (manifest.mixers, manifest.lawcat, manifest.lolcats or plan.lolcats)
    if options != (mixers, plan.lawcat, plan.lolcats):
        raise UsageError(f"init {init}: its mixers or their options differ from the recipe's")
    return student


def _refuse_changes(saved: checkpoint.Checkpoint, fingerprint: dict[str, Any]) -> None:
    differing = checkpoint.differing_keys(saved.fingerprint, fingerprint)
    if differing:
        told = "; ".join(f"{key} was {a!r}, is {b!r}" for key, (a, b) in differing.items())
        raise TrainingError(
            f"this run was begun with other settings ({told}); give those, or --force"
        )


@contextlib.contextmanager
def _claimed(folder: Path, *, resume: bool, force: bool) -> Iterator[None]:
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
        yield


def _last_evaluation(folder: Path) -> dict[str, Any]:
    found = [r["eval"] for r in read_metrics(folder) if r.get("eval")]
    return dict(found[-1]) if found else {}


def _write(
    work: _Work,
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
    manifest = StudentManifest(
        name=final.name,
        base=work.source.identity,
        mixers=config.mixers,
        lawcat=config.lawcat,
        lolcats=config.lolcats if "lolcats" in config.mixers else None,
        recipe=dump(work.plan),
        data=tuple(dump(f) for f in next(iter(work.mixtures.values())).files),
        training=records,
        metrics=metrics,
        versions=_versions(),
    )
    with staged(final, force=force, kind="student") as directory:
        write_student(directory, manifest, work.tensors(), dtype=choice.dtype)
        shutil.copyfile(folder / FILE, directory / FILE)
        draw_losses(read_metrics(folder), directory / "loss.png")
    shutil.rmtree(folder)


def _versions() -> dict[str, str]:
    found = {"edgekit": __version__, "python": platform.python_version()}
    return found | {package: metadata.version(package) for package in PACKAGES}
