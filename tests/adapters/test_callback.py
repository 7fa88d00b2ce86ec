"""AFLoRA under transformers' Trainer, resumed included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from edgekit.adapters.aflora import AFLoraCallback, FreezeController, FreezePlan
from edgekit.errors import UnsupportedError

Make = Callable[..., nn.Module]
STEPS = 24


def trained(model: nn.Module, ids: torch.Tensor, out: Path, **options: Any) -> Trainer:
    resume = options.pop("resume", None)
    callback = AFLoraCallback(plan=options.pop("plan", None))
    settings = {"max_steps": STEPS, "save_steps": 10, "logging_steps": 1, "learning_rate": 1e-2}
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        restore_callback_states_from_checkpoint=True,
        **(settings | options),
    )
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(40, 1)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def controller_of(trainer: Trainer) -> FreezeController:
    """Of the callback that ran: a resumed Trainer makes its own."""
    callbacks = trainer.callback_handler.callbacks
    (callback,) = [c for c in callbacks if isinstance(c, AFLoraCallback)]
    assert callback.controller is not None
    return callback.controller


def test_freezes_on_schedule_and_frees_the_optimizer(
    ids: torch.Tensor, tmp_path: Path, tiny_aflora: Make
) -> None:
    model = tiny_aflora(delta_t=2)
    trainer = trained(model, ids, tmp_path)
    controller = controller_of(trainer)
    assert controller.schedule.total == STEPS
    assert not controller.alive
    history = trainer.state.log_history
    fractions = [log["alive_fraction"] for log in history if "alive_fraction" in log]
    assert fractions[0] == 1.0
    assert fractions == sorted(fractions, reverse=True)
    vectors = {p for p in model.parameters() if p.requires_grad}
    assert len(vectors) == 20
    assert set(trainer.optimizer.optimizer.state) == vectors


@pytest.mark.parametrize("plan", [None, FreezePlan(interval=3, order="random")])
def test_a_resumed_run_freezes_the_same(
    ids: torch.Tensor, tmp_path: Path, tiny_aflora: Make, plan: FreezePlan | None
) -> None:
    whole = trained(tiny_aflora(delta_t=2), ids, tmp_path, plan=plan)
    checkpoint = str(tmp_path / "checkpoint-10")
    resumed = trained(tiny_aflora(delta_t=2), ids, tmp_path, resume=checkpoint, plan=plan)
    logs = [
        [(e.step, e.module, e.part) for e in controller_of(trainer).log]
        for trainer in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    assert {step < 10 for step, _, _ in logs[0]} == {True, False}


def test_epochs_count(ids: torch.Tensor, tmp_path: Path, tiny_aflora: Make) -> None:
    model = tiny_aflora(t_init="1ep", t_final="1ep")
    options = {"max_steps": -1, "num_train_epochs": 4, "save_strategy": "no"}
    schedule = controller_of(trained(model, ids[:1], tmp_path, **options)).schedule
    assert (schedule.total, schedule.start, schedule.final) == (80, 20, 20)


def test_sharded_training_is_refused(tmp_path: Path, tiny_aflora: Make) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.fsdp = ["full_shard"]
    with pytest.raises(UnsupportedError, match="FSDP and DeepSpeed shard"):
        AFLoraCallback().on_train_begin(arguments, None, None, model=tiny_aflora())
