"""What happened at each step, and when to save and to stop: a callback of transformers' Trainer."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from edgekit.adapters.controller import FreezeController
from edgekit.errors import TrainingError

__all__ = ["FILE", "WHOLE", "Clock", "Recorder", "read_records", "write_records"]

FILE = "metrics.jsonl"
WHOLE = "whole"  # the file that a checkpoint gets last
Progress = Callable[[str, int, int], None]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """When a training saves and stops.

    Attributes:
        checkpoint_seconds: between checkpoints; None: there are none.
        stop_at: on the monotonic clock; a training that is not over then saves itself and stops.
    """

    checkpoint_seconds: float | None = None
    stop_at: float | None = None

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        return self.stop_at is not None and time.monotonic() > self.stop_at


class Recorder(TrainerCallback):
    """Writes a record for each step, tells of progress, asks for checkpoints, stops in time.

    Attributes:
        records: of all steps so far, an earlier run's included.
        stopped: whether the clock ended the training.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        name: str,
        clock: Clock,
        controller: Callable[[], FreezeController | None],
        log: Path | None = None,
        records: Sequence[Record] = (),
        progress: Progress | None = None,
    ) -> None:
        """Begin, or go on.

        Args:
            optimizer: whose memory is counted.
            name: of the training, for progress and errors.
            clock: when to save and to stop.
            controller: gives what freezes projections, once there is one.
            log: the file of records, replaced now; None: they are kept in memory only.
            records: of the steps that were made before.
            progress: called with a step's name, its number and the count of steps.
        """
        self.records, self.stopped = [dict(r) for r in records], False
        self._optimizer, self._controller = optimizer, controller
        self._name, self._clock, self._log, self._progress = name, clock, log, progress
        self._begun, self._saved = 0.0, time.monotonic()
        self._held: Record = {}
        self._unmarked: Path | None = None
        if log is not None:
            write_records(log, self.records)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell of the step."""
        self._mark()
        if self._progress is not None:
            loss = f": loss {self.records[-1]['loss']:.4f}" if self.records else ""
            self._progress(f"{self._name}{loss}", state.global_step, state.max_steps)
        self._begun = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what training holds: gradients are still there, the optimiser's state already."""
        groups = self._optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        controller = self._controller()
        self._held = {
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "gradient_bytes": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer_bytes": sum(
                value.nbytes
                for kept in self._optimizer.state.values()
                for value in kept.values()
                if isinstance(value, torch.Tensor)
            ),
            "score_bytes": 0 if controller is None else controller.nbytes,
        }

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide about a checkpoint and the end."""
        taken = time.perf_counter() - self._begun
        before = self.records[-1]["seconds"] if self.records else 0.0
        self._held |= {"step_seconds": round(taken, 4), "seconds": round(before + taken, 3)}
        last = state.global_step >= state.max_steps
        if self._clock.over and not last:
            self.stopped = control.should_training_stop = True
        every = self._clock.checkpoint_seconds
        due = every is not None and time.monotonic() - self._saved >= every
        control.should_save = every is not None and not last and (due or self.stopped)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the step's record.

        Raises:
            TrainingError: if its loss or gradient is not finite; the checkpoint before it stays.
        """
        if logs is None or "loss" not in logs:
            return
        step, norm = state.global_step - 1, logs.get("grad_norm", 0.0)
        if not (math.isfinite(logs["loss"]) and math.isfinite(norm)):
            raise TrainingError(
                f"{self._name}, step {step}: the loss or its gradient is not finite; an earlier "
                "checkpoint is good, but lower lr and begin again with --force"
            )
        record = {
            "step": step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "gradient_norm": norm,
            **self._held,
        }
        self.records.append(record)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(_line(record))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the checkpoint, which other callbacks may still write into."""
        self._saved = time.monotonic()
        self._unmarked = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the last checkpoint."""
        self._mark()

    def _mark(self) -> None:
        """Tell that a checkpoint is whole; a killed run leaves one without this file."""
        if self._unmarked is not None:
            (self._unmarked / WHOLE).touch()
        self._unmarked = None


def read_records(path: Path) -> list[Record]:
    """The records in a file; a last line that a killed run left half written is dropped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records: list[Record] = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write all records at once; the file appears whole."""
    part = path.with_suffix(".part")
    part.write_text("".join(_line(record) for record in records), encoding="utf-8")
    os.replace(part, path)


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
