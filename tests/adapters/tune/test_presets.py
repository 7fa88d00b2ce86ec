"""Presets: the published schedules, in numbers, and the modules that each adapts."""

from collections.abc import Callable

import pytest
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, BertConfig, TrainingArguments

from edgekit.adapters.aflora import FreezeController
from edgekit.adapters.tune.presets import preset, preset_names, preset_training
from edgekit.errors import UsageError


@pytest.mark.parametrize(
    ("name", "epochs", "mean"),
    [("glue-20", 20, 0.1125), ("glue-10", 10, 0.150), ("gsm8k", 3, 0.567)],
)
def test_mean_of_the_published_schedules(name: str, epochs: int, mean: float) -> None:
    schedule = preset(name).freeze_plan().over(6000, 6000 // epochs)
    assert schedule.mean() == pytest.approx(mean, abs=1e-3)
    assert preset_training(name)["num_train_epochs"] == epochs


def test_the_reference_cadence() -> None:
    for name in ("glue-20", "glue-10", "gsm8k"):
        plan = preset(name).freeze_plan()
        assert (plan.rule, plan.cadence, plan.interval) == ("reference", "window", 10)
    assert preset("gsm8k").aflora_alpha / preset("gsm8k").r == 2
    assert preset("encoder").freeze_plan().cadence == "step"


@pytest.mark.parametrize("name", preset_names())
def test_all_of_them_are_allowed(name: str) -> None:
    assert preset(name, r=3).r == 3
    TrainingArguments("out", use_cpu=True, **preset_training(name))


def test_encoders_never_train_their_attention() -> None:
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
    )
    model = get_peft_model(AutoModel.from_config(config), preset("encoder"))
    alive = FreezeController(model, total_steps=10).alive
    assert len(alive) == 2 * 2 * 2  # A and B of two linears in two layers
    assert all("attention" not in name for name in alive)


def test_decoders_train_everything(tiny_llama: Callable[..., nn.Module]) -> None:
    model = get_peft_model(tiny_llama(), preset("decoder"))
    assert len(FreezeController(model, total_steps=10).alive) == 2 * 5 * 2


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="'glue' is unknown; known: bart, decoder"):
        preset("glue")
