"""`tune`: a model and examples in, an adapter out; whole, or resumable where it was."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgekit.adapters.aflora import fold_to_lora
from edgekit.adapters.tune.folder import check_settings, claimed, latest_checkpoint
from edgekit.adapters.tune.manifest import (
    Trial,
    TuneManifest,
    describe_device,
    memory_of,
    package_versions,
    seconds_per_step,
    trainable_of,
    write_tune,
)
from edgekit.adapters.tune.model import Base, Tuned, new_tuned, open_base
from edgekit.adapters.tune.plot import draw_freezes, draw_training
from edgekit.adapters.tune.recipe import Recipe
from edgekit.adapters.tune.recorder import FILE, Clock, write_records
from edgekit.adapters.tune.rows import Examples, read_rows
from edgekit.adapters.tune.search import at_rate, best_of, check_rates, search
from edgekit.adapters.tune.training import Trained, Training, held_out_loss, train
from edgekit.allocator import keep_freed_memory
from edgekit.config import dump
from edgekit.errors import UnsupportedError, UsageError
from edgekit.models.precision import Precision, choose_precision
from edgekit.runtime.text import Tokenizer
from edgekit.staging import refuse_existing, staged

__all__ = ["Settings", "TuneReport", "tune"]

Progress = Callable[[str, int, int], None]
FOLDED = "lora"  # the plain LoRA beside an AFLoRA adapter
CARD = "README.md"  # PEFT's, with nothing filled in


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to run a recipe: nothing here changes what is learnt, but for rounding and the search.

    Attributes:
        precision: of matrix products; `auto` takes bf16 where the hardware has it.
        cpu: use the CPU where there is a GPU too.
        lr_search: rates to try first, three or more; none: the recipe's rate stands.
        checkpoint_seconds: between checkpoints.
        stop_after: seconds after which a checkpoint is written and the run ends, to be resumed.
    """

    precision: Precision | Literal["auto"] = "auto"
    cpu: bool = False
    lr_search: tuple[float, ...] = ()
    checkpoint_seconds: float = 120.0
    stop_after: float | None = None

    def __post_init__(self) -> None:
        """Check the rates.

        Raises:
            UsageError: if there are some, but no search.
        """
        if self.lr_search:
            check_rates(self.lr_search)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneReport:
    """What `tune` did.

    Attributes:
        out: the adapter's directory, or that of the unfinished run.
        finished: whether the adapter is there; False when `stop_after` ended the run.
        manifest: of the adapter; None if it is not there.
    """

    out: Path
    finished: bool
    manifest: TuneManifest | None


def tune(
    source: str | Path,
    out: str | Path,
    plan: Recipe,
    *,
    data: Sequence[str | Path],
    student: str | Path | None = None,
    held_out: Path | None = None,
    settings: Settings | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> TuneReport:
    """Tune an adapter.

    Args:
        source: the model, as for `convert`, or a student whose teacher is found by its name.
        out: the adapter directory to make; `OUT.run` beside it holds the run until it is done.
        plan: `recipe.load_recipe` gives it.
        data: `.jsonl` files of prompt and completion, messages, or text; or `datasets:ID[:SPLIT]`.
        student: the student of `source` to tune; None: `source` itself.
        held_out: examples to measure with.
        settings: how to run.
        resume: go on with an unfinished run.
        force: replace the adapter at `out`, and forget an unfinished run unless `resume`.
        progress: called with a step's name, its number and the count of steps.

    Returns:
        Where the adapter is, and how its training went.

    Raises:
        UsageError: for an argument or example that is not allowed.
        SourceError: if the model or student cannot be read or do not fit together.
        BundleError: if `out` exists or cannot be written.
        TrainingError: if a loss is not finite, or the run may not be resumed.
    """
    started, choice = time.monotonic(), settings or Settings()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError("tune runs in one process; start it without a launcher")
    final = Path(os.path.realpath(out))
    refuse_existing(final, force, "adapter")
    folder = final.with_name(f"{final.name}.run")
    stop_at = None if choice.stop_after is None else started + choice.stop_after
    with claimed(folder, resume=resume, force=force):
        work = _Work.open(source, student, plan, data, held_out, choice)
        check_settings(folder, work.fingerprint)
        training = Training(
            folder=folder,
            name="tuning",
            clock=Clock(checkpoint_seconds=choice.checkpoint_seconds, stop_at=stop_at),
            cpu=choice.cpu,
            checkpoint=latest_checkpoint(folder),
            progress=progress,
        )
        trials = work.searched(choice.lr_search, training)
        if trials is None:
            return TuneReport(out=folder, finished=False, manifest=None)
        chosen = work.plan if not trials else at_rate(work.plan, best_of(trials))
        model = work.fresh()
        trained = train(model, work.examples.train, chosen, training)
        if not trained.finished:
            return TuneReport(out=folder, finished=False, manifest=None)
        manifest = work.manifest(final.name, chosen, trained, trials, model)
        manifest = _write(final, manifest, model, trained, force=force)
        shutil.rmtree(folder)
    return TuneReport(out=final, finished=True, manifest=manifest)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What a tuning reads."""

    base: Base
    plan: Recipe
    examples: Examples
    precision: Precision
    fingerprint: dict[str, Any]

    @classmethod
    def open(
        cls,
        source: str | Path,
        student: str | Path | None,
        plan: Recipe,
        data: Sequence[str | Path],
        held_out: Path | None,
        choice: Settings,
    ) -> "_Work":
        base = open_base(source, student)
        if not base.config.eos_token_ids:
            raise UsageError(f"{base.source.name} has no end-of-text token, which ends an answer")
        plan.modules(base.config.num_layers)  # a layer that is not there shows before the reading
        limit = base.config.context_limit
        plan = replace(plan, length=plan.length if limit is None else min(plan.length, limit))
        precision = choose_precision(choice.precision, cpu=choice.cpu)
        examples = read_rows(
            data,
            held_out,
            plan,
            Tokenizer(base.source.directory),
            eos=base.config.eos_token_ids[0],
            hold_back=bool(choice.lr_search),
        )
        keep_freed_memory()
        fingerprint = {
            "recipe": dump(plan),
            "base": base.source.identity["sha256"],
            "student": None if base.student is None else dump(base.student.manifest.files),
            "data": list(examples.train.files),
            "held_out": [] if examples.held_out is None else list(examples.held_out.files),
            "search": choice.lr_search,
            "precision": precision,
        }
        return cls(
            base=base, plan=plan, examples=examples, precision=precision, fingerprint=fingerprint
        )

    def fresh(self) -> Tuned:
        return new_tuned(self.base, self.plan, self.precision)

    def searched(self, rates: tuple[float, ...], training: Training) -> tuple[Trial, ...] | None:
        """The search's trials; none if no rates are given, None if the clock ended it."""
        if not rates:
            return ()
        return search(self.fresh, self.examples, self.plan, rates, training)

    def manifest(
        self,
        name: str,
        plan: Recipe,
        trained: Trained,
        trials: tuple[Trial, ...],
        model: Tuned,
    ) -> TuneManifest:
        records, held_out = trained.records, self.examples.held_out
        metrics = {"loss": float(records[-1]["loss"])}
        if held_out is not None:
            metrics["held_out_loss"] = held_out_loss(model, held_out, plan.micro_batch)
            with model.disable_adapter():
                metrics["base_held_out_loss"] = held_out_loss(model, held_out, plan.micro_batch)
        return TuneManifest(
            name=name,
            method=plan.method,
            order=("tune",) if self.base.student is None else ("distil", "tune"),
            base=self.base.source.identity,
            student=self.base.student_record,
            recipe=dump(plan),
            data=self.examples.train.files,
            held_out=() if held_out is None else held_out.files,
            seeds={"adapter": plan.seed, "order": plan.seed, "dropout": plan.seed},
            steps=trained.steps,
            rows=trained.steps * plan.batch,
            trainable=trainable_of(records),
            memory=memory_of(records),
            seconds_per_step=seconds_per_step(records),
            seconds=float(records[-1]["seconds"]),
            device=describe_device(model.device, self.precision),
            search=trials,
            metrics=metrics,
            freezes=trained.freezes,
            versions=package_versions(),
        )


def _write(
    final: Path, manifest: TuneManifest, model: Tuned, trained: Trained, *, force: bool
) -> TuneManifest:
    """The adapter, whole or not at all."""
    with staged(final, force=force, kind="adapter") as work:
        model.save_pretrained(str(work), save_embedding_layers=False)
        (work / CARD).unlink(missing_ok=True)
        if manifest.method == "aflora":
            fold_to_lora(work, work / FOLDED)
        write_records(work / FILE, trained.records)
        with contextlib.suppress(ModuleNotFoundError):  # without matplotlib there are no pictures
            draw_training(trained.records, work / "loss.png")
            if trained.freezes:
                layers = model.decoder.config.num_layers
                draw_freezes(
                    trained.freezes, work / "freeze.png", steps=trained.steps, layers=layers
                )
        return write_tune(work, manifest)
