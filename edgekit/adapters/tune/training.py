"""One training of one adapter by transformers' Trainer, from its beginning or a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from edgekit.adapters.callback import AFLoraCallback
from edgekit.adapters.controller import FreezeController, event_record
from edgekit.adapters.tune.model import Tuned
from edgekit.adapters.tune.recipe import Recipe
from edgekit.adapters.tune.recorder import FILE, Clock, Record, Recorder, read_records
from edgekit.adapters.tune.rows import Rows
from edgekit.data.batch import IGNORE

__all__ = ["Trained", "Training", "held_out_loss", "train"]

Progress = Callable[[str, int, int], None]
PROJECTIONS = (".aflora_A.", ".aflora_B.", ".lora_A.", ".lora_B.")
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Everything around a training that is not what it learns.

    Attributes:
        folder: of its checkpoints and records.
        name: for progress and errors.
        clock: when to save and to stop.
        cpu: use the CPU where there is a GPU too.
        checkpoint: to go on from.
        progress: called with a step's name, its number and the count of steps.
    """

    folder: Path
    name: str
    clock: Clock
    cpu: bool = False
    checkpoint: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How a training ended.

    Attributes:
        finished: whether it came to its end; otherwise its checkpoint is in its folder.
        steps: optimiser steps of the whole.
        records: one for each step so far.
        freezes: what froze: step, module, part, score; -1 is the step of what never was trained.
    """

    finished: bool
    steps: int
    records: tuple[Record, ...]
    freezes: tuple[dict[str, Any], ...]


def train(model: Tuned, rows: Rows, plan: Recipe, training: Training) -> Trained:
    """Train the adapter of `model` in place.

    Args:
        model: fresh from `new_tuned`, whether or not the training goes on from a checkpoint.
        rows: to learn.
        plan: how.
        training: everything else.

    Raises:
        TrainingError: if a loss or gradient is not finite; checkpoints from before it stay.
    """
    optimizer = torch.optim.AdamW(_groups(model, plan), lr=plan.lr)
    trainer = _TuneTrainer(
        model=model,
        args=_arguments(plan, training),
        train_dataset=rows,
        data_collator=rows.batch,
        optimizers=(optimizer, None),
        callbacks=[AFLoraCallback(plan=plan.plan)] if plan.plan is not None else [],
    )
    trainer.model_accepts_loss_kwargs = True  # `compute_loss` divides by the labels of all parts
    trainer.remove_callback(PrinterCallback)
    steps_done = 0 if training.checkpoint is None else int(training.checkpoint.name.split("-")[1])
    log = training.folder / FILE if training.clock.checkpoint_seconds is not None else None
    recorder = Recorder(
        optimizer,
        name=training.name,
        clock=training.clock,
        controller=lambda: trainer.controller,
        log=log,
        records=read_records(log)[:steps_done] if log is not None else (),
        progress=training.progress,
    )
    trainer.add_callback(recorder)
    resumed = None if training.checkpoint is None else str(training.checkpoint)
    trainer.train(resume_from_checkpoint=resumed)
    controller = trainer.controller
    return Trained(
        finished=not recorder.stopped,
        steps=trainer.state.max_steps,
        records=tuple(recorder.records),
        freezes=tuple(event_record(event) for event in controller.log) if controller else (),
    )


@torch.no_grad()
def held_out_loss(model: Tuned, rows: Rows, batch: int) -> float:
    """Mean cross-entropy of the tokens to predict, in nats; the adapter as it is."""
    was_training, total = model.training, 0.0
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # little padding
    for start in range(0, len(rows), batch):
        tensors = rows.batch([rows[i] for i in order[start : start + batch]])
        total += float(model(**{name: t.to(model.device) for name, t in tensors.items()}))
    model.train(was_training)
    return total / rows.labels


class _TuneTrainer(Trainer):
    """The Trainer with the decoder's own loss; checkpoints hold the adapter alone."""

    @property
    def controller(self) -> FreezeController | None:
        """What freezes projections, once training has begun; a resumed run makes its own."""
        found = (c for c in self.callback_handler.callbacks if isinstance(c, AFLoraCallback))
        callback = next(found, None)
        return None if callback is None else callback.controller

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Cross-entropy by token, over all micro-batches of the step."""
        count = num_items_in_batch
        if count is None:
            count = (inputs["labels"] != IGNORE).sum()
        total: torch.Tensor = model(**inputs)
        return total / count

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert isinstance(self.model, Tuned)
        # "auto" would look for the base's configuration on the Hub.
        self.model.save_pretrained(str(output_dir), save_embedding_layers=False)


def _groups(model: Tuned, plan: Recipe) -> list[dict[str, Any]]:
    """Matrices and vectors, each at its own rate; those that are frozen later keep their place."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [p for n, p in trained.items() if any(part in n for part in PROJECTIONS)]
    vectors = [p for n, p in trained.items() if not any(part in n for part in PROJECTIONS)]
    rate = plan.lr if plan.vector_lr is None else plan.vector_lr
    groups = [
        {"params": matrices, "lr": plan.lr, "weight_decay": plan.weight_decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _arguments(plan: Recipe, training: Training) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(training.folder),
        max_steps=plan.steps or -1,
        num_train_epochs=plan.epochs or 1.0,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.batch // plan.micro_batch,
        learning_rate=plan.lr,
        lr_scheduler_type=SCHEDULES[plan.schedule],
        warmup_steps=plan.warmup,
        max_grad_norm=plan.clip,
        seed=plan.seed,
        data_seed=plan.seed,
        use_cpu=training.cpu or not torch.accelerator.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # `Recorder` says when
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # otherwise the Trainer copies the model to every GPU at every step
    return arguments
