"""A tiny transformers model, and what trains it for a few steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from edgekit.adapters.aflora import AFLoraConfig, FreezeController

Model = Callable[..., nn.Module]
Logits = Callable[[nn.Module], torch.Tensor]


@pytest.fixture
def tiny_llama() -> Model:
    """Always the same model."""

    def make(**options: Any) -> nn.Module:
        torch.manual_seed(11)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **options,
        )
        return AutoModelForCausalLM.from_config(config)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids `[3, 9]`."""
    return torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def scrambled() -> Model:
    """Gives every b and d a value that no start has, so that the adapters say something."""

    def scramble(model: nn.Module) -> nn.Module:
        random = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "aflora_b" in name or "aflora_d" in name:
                with torch.no_grad():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        return model

    return scramble


@pytest.fixture
def tiny_aflora(tiny_llama: Model, scrambled: Model) -> Model:
    """The tiny model with AFLoRA; `trained` scrambles it."""

    def make(*, trained: bool = False, **options: Any) -> nn.Module:
        base = tiny_llama()
        torch.manual_seed(3)
        model = get_peft_model(base, AFLoraConfig(**{"r": 3, **options}))
        if not trained:
            return model
        FreezeController(model, total_steps=10)
        return scrambled(model)

    return make


@pytest.fixture
def logits(ids: torch.Tensor) -> Logits:
    """What a model says to `ids`."""

    @torch.no_grad()
    def say(model: nn.Module) -> torch.Tensor:
        return model.eval()(input_ids=ids).logits

    return say
