"""Freezing while transformers' Trainer trains.

Gradients are read where the Trainer has accumulated, unscaled and clipped them, and a projection
that freezes is not moved again by the step that follows.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from edgekit.adapters.controller import FreezeController
from edgekit.adapters.plan import FreezePlan
from edgekit.config import dump, load
from edgekit.errors import UnsupportedError

__all__ = ["AFLoraCallback"]

SCORES = "aflora_ema.safetensors"


class AFLoraCallback(TrainerCallback, ExportableState):
    """Attaches a `FreezeController` to a Trainer's model.

    Checkpoints keep the scores beside the adapter, and the log in the trainer's state: a resumed
    run freezes what the other would have frozen. Give the Trainer
    `restore_callback_states_from_checkpoint=True` for that.

    Attributes:
        controller: None before training begins.
    """

    def __init__(self, adapter: str = "default", plan: FreezePlan | None = None) -> None:
        """Follow `adapter`; a `plan` of None is that of its configuration."""
        self._adapter = adapter
        self._plan: dict[str, Any] | None = None if plan is None else dump(plan)
        self._log: list[dict[str, Any]] = []
        self.controller: FreezeController | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer's state keeps of this."""
        log = self._log if self.controller is None else self.controller.state_dict()["log"]
        return {
            "args": {"adapter": self._adapter},
            "attributes": {"_log": log, "_plan": self._plan},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the projections, and go on from a checkpoint's log and scores.

        Raises:
            UnsupportedError: where parameters or gradients are sharded.
        """
        model = kwargs["model"]
        _refuse_sharding(args)
        per_epoch = round(state.max_steps / state.num_train_epochs) if args.max_steps <= 0 else None
        self.controller = FreezeController(
            model,
            total_steps=state.max_steps,
            adapter=self._adapter,
            plan=None if self._plan is None else load(FreezePlan, self._plan, where="callback"),
            steps_per_epoch=per_epoch,
        )
        if self._log:
            scores = _kept_scores(_checkpoint(args, state.global_step))
            saved = {"log": self._log, "scores": scores}
            self.controller.load_state_dict(saved, _bare(kwargs.get("optimizer")))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score, and freeze what is due."""
        if self.controller is not None:
            self.controller.step(state.global_step, _bare(kwargs.get("optimizer")))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add how much is still trained, for the callbacks after this one and for the history."""
        if self.controller is None or logs is None:
            return
        told = {
            "alive_fraction": self.controller.alive_fraction,
            "trainable": self.controller.trainable(),
        }
        logs.update(told)
        state.log_history[-1].update(told)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the scores beside the checkpoint."""
        if self.controller is None or not state.is_world_process_zero:
            return
        folder = _checkpoint(args, state.global_step)
        scores = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.controller.state_dict()["scores"].items()
        }
        if scores and folder.is_dir():
            save_file(scores, folder / SCORES)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of a schedule that the training was too short for."""
        controller = self.controller
        if controller is None or controller.schedule.shape == "never" or not controller.alive:
            return
        if state.global_step >= controller.schedule.total > controller.schedule.end:
            left = len(controller.alive)
            warnings.warn(f"{left} projections were not frozen at the end", stacklevel=2)


def _refuse_sharding(args: TrainingArguments) -> None:
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise UnsupportedError(
            "AFLoRA reads whole gradients: FSDP and DeepSpeed shard them; train with DDP or alone"
        )


def _bare(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimiser that holds the state, without accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{step}"


def _kept_scores(checkpoint: Path) -> dict[str, torch.Tensor]:
    file = checkpoint / SCORES
    return load_file(file) if file.is_file() else {}
