"""The training loop: time, the optimiser, processes, checkpoints and records, for any stage."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgekit.data.batch import Batch
from edgekit.distill import checkpoint, recipe
from edgekit.distill.metrics import MetricsLog
from edgekit.distill.processes import Processes
from edgekit.distill.schedule import rate_factor
from edgekit.distill.stage import Stage, TorchBatch, torch_batch
from edgekit.errors import TrainingError

__all__ = ["Outcome", "Run", "train"]

Progress = Callable[[str, int, int], None]
Rows = Callable[[int, int], Batch]
BETAS = (0.9, 0.999)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What all stages of one distillation share.

    Attributes:
        folder: of checkpoints and records.
        processes: that share each step.
        fingerprint: what a checkpoint must agree with.
        seed: of dropout.
        checkpoint_seconds: between checkpoints.
        finish: take no further step.
        stop_after: seconds after which a stage saves itself and stops; None: at its end only.
        evaluate: figures of the student as it is, such as its perplexity; in every process.
        evaluate_tokens: between evaluations; None: only at a stage's end.
        progress: called with a step's name, its number and the count of steps.
        history: records of the stages that are over.
        started: on the monotonic clock.
    """

    folder: Path
    processes: Processes
    fingerprint: dict[str, Any]
    seed: int
    checkpoint_seconds: float = 120.0
    stop_after: float | None = None
    finish: bool = False
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluate_tokens: int | None = None
    progress: Progress | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether `stop_after` has passed, on the first process's clock, for all of them."""
        if self.stop_after is None:  # the same in every process: nothing to agree on
            return False
        late = time.monotonic() - self.started > self.stop_after
        return bool(self.processes.add_up(torch.tensor(float(late and self.leads))))

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.processes.rank == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a stage ended, or how far it came: its last loss and what it took."""

    finished: bool
    steps: int
    tokens: int
    seconds: float
    loss: float | None


@dataclass(kw_only=True, slots=True)
class _Position:
    """Where a stage is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def train(
    stage: Stage,
    config: recipe.Stage,
    rows: Rows,
    run: Run,
    resumed: checkpoint.Checkpoint | None = None,
) -> Outcome:
    """Train one stage to its end.

    Args:
        stage: what to learn.
        config: its schedule.
        rows: rows `start .. start + count` of an endless stream, a pure function.
        run: everything around it.
        resumed: a checkpoint of this very stage to go on from.

    Raises:
        TrainingError: if a loss or gradient is not finite; checkpoints from before it stay.
        UsageError: if the batch cannot be shared out evenly.
    """
    stepper = _Stepper(stage, config, rows, run)
    at = stepper.restore(resumed) if resumed else _Position()
    if not resumed:
        stage.prepare(stepper.batch(0).rows(0, config.micro_batch))
    saved = time.monotonic()
    loss, stop = None, run.finish or at.step == config.steps
    done = {r["stage"]: r["steps"] for r in run.history} | {stage.number: at.step}
    with MetricsLog(run.folder, done) if run.leads else _NoLog() as log:
        while not stop:
            if run.progress:
                run.progress(_shown(stage, loss), at.step, config.steps)
            record = stepper.step(at)
            loss = record["loss"]
            log.write(record)
            stop = at.step == config.steps or run.over
            if run.leads and (stop or time.monotonic() - saved > run.checkpoint_seconds):
                stepper.save(at, loss)
                saved = time.monotonic()
    finished = at.step == config.steps
    loss = loss if resumed is None or loss is not None else resumed.loss
    return Outcome(
        finished=finished, steps=at.step, tokens=at.tokens, seconds=at.seconds, loss=loss
    )


class _Stepper:
    """One stage with its optimiser."""

    def __init__(self, stage: Stage, config: recipe.Stage, rows: Rows, run: Run) -> None:
        self._stage, self._config, self._rows, self._run = stage, config, rows, run
        self._groups = stage.groups()
        self._optimizer = torch.optim.AdamW(
            [{"params": group.parameters, "lr": group.lr} for group in self._groups],
            betas=BETAS,
            weight_decay=config.weight_decay,
        )

    def batch(self, step: int) -> TorchBatch:
        """All rows of `step`, over all processes."""
        count = self._config.batch
        return torch_batch(self._rows(step * count, count), self._run.processes.device)

    def step(self, at: _Position) -> dict[str, Any]:
        """One optimiser step; moves `at` on and returns its record."""
        started, before = time.perf_counter(), at.tokens
        whole, losses = self._gradients(at.step)
        norm = self._clip(at.step, whole, losses)
        factor = rate_factor(self._config, at.step)
        for group, entry in zip(self._groups, self._optimizer.param_groups, strict=True):
            entry["lr"] = group.lr * factor
        self._optimizer.step()
        record: dict[str, Any] = {
            "stage": self._stage.number,
            "step": at.step,
            "tokens": at.tokens + whole.positions,
            **self._stage.summary(losses),
            "lr": self._config.lr * factor,
            "gradient_norm": norm,
            "seconds": round(at.seconds + time.perf_counter() - started, 4),
        }
        at.step, at.tokens, at.seconds = at.step + 1, record["tokens"], record["seconds"]
        return record | self._evaluated(before, at)

    def _gradients(self, step: int) -> tuple[TorchBatch, torch.Tensor]:
        """The step's whole batch, with its gradients in place and its losses."""
        run, config = self._run, self._config
        whole = self.batch(step)
        start, stop = run.processes.share(config.batch)
        torch.manual_seed(run.seed + step * run.processes.count + run.processes.rank)
        self._optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(len(self._stage.parts))
        for first in range(start, stop, config.micro_batch):
            part = whole.rows(first, min(first + config.micro_batch, stop))
            losses += self._stage.accumulate(part, whole)
        run.processes.add_up_gradients(p for g in self._groups for p in g.parameters)
        return whole, run.processes.add_up(losses)

    def _clip(self, step: int, whole: TorchBatch, losses: torch.Tensor) -> float:
        """Clip the gradients; returns the largest norm.

        Raises:
            TrainingError: if a loss or a norm is not finite.
        """
        together = self._stage.clipped_together()
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            for group in together
        ]
        if losses.isfinite().all() and torch.stack(norms).isfinite().all():
            for group, norm in zip(together, norms, strict=True):
                torch.nn.utils.clip_grads_with_norm_(group, self._config.clip, norm)
            return float(max(norms))
        where = self._stage.culprit(whole, losses)
        raise TrainingError(
            f"stage {self._stage.name}, step {step}: the loss or its gradient is not finite, first "
            f"in {where}; nothing of this step was kept, and the last checkpoint in "
            f"{self._run.folder} is good: lower {self._stage.name}.lr or its gate_lr or mixer_lr"
        )

    def _evaluated(self, before: int, at: _Position) -> dict[str, Any]:
        """What the record of a step says of an evaluation, if one is due after it."""
        run, every = self._run, self._run.evaluate_tokens
        due = every is not None and before // every < at.tokens // every
        if run.evaluate is None or not (due or at.step == self._config.steps):
            return {}
        return {"eval": run.evaluate()}

    def save(self, at: _Position, loss: float) -> None:
        """Write a checkpoint of the student and the optimiser."""
        run, stage = self._run, self._stage
        tensors = {f"buffer.{name}": t for name, t in stage.buffers().items()}
        for name, parameter in stage.tensors().items():
            tensors[f"parameter.{name}"] = parameter
            moments = self._optimizer.state.get(parameter, {})
            for key, value in moments.items():
                tensors[f"{key}.{name}"] = value
        number = sum(r["steps"] for r in run.history) + at.step
        checkpoint.write(
            run.folder,
            number,
            checkpoint.Checkpoint(
                stage=stage.number,
                step=at.step,
                tokens=at.tokens,
                seconds=at.seconds,
                loss=loss,
                fingerprint=run.fingerprint,
                history=run.history,
                tensors=tensors,
            ),
        )

    @torch.no_grad()
    def restore(self, saved: checkpoint.Checkpoint) -> _Position:
        """Put parameters, moments and buffers back."""
        for name, buffer in self._stage.buffers().items():
            buffer.copy_(saved.tensors[f"buffer.{name}"])
        for name, parameter in self._stage.tensors().items():
            parameter.copy_(saved.tensors[f"parameter.{name}"])
            keys = [k for k in MOMENTS if f"{k}.{name}" in saved.tensors]
            if keys:
                moments = {k: _placed(k, saved.tensors[f"{k}.{name}"], parameter) for k in keys}
                self._optimizer.state[parameter] = moments
        return _Position(step=saved.step, tokens=saved.tokens, seconds=saved.seconds)


class _NoLog:
    """Stands for the log in processes that do not write."""

    def write(self, record: dict[str, Any]) -> None:
        """Drop it."""

    def __enter__(self) -> "_NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _placed(key: str, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """AdamW counts steps on the CPU and keeps the moments beside their parameter."""
    return value.clone() if key == "step" else value.to(parameter.device, copy=True)


def _shown(stage: Stage, loss: float | None) -> str:
    return stage.name if loss is None else f"{stage.name}: loss {loss:.4f}"
