"""PEFT's own tests of custom models, run on AFLoRA: `make test-peft` fetches and runs them.

They are parametrised when they are defined; here their cases are replaced before pytest asks.
"""

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit.adapters.aflora import AFLoraConfig

SOURCES = Path(os.environ["PEFT_SOURCES"])
CASES = [
    ("MLP, one linear", "MLP", AFLoraConfig, {"target_modules": "lin0"}),
    ("MLP, a list", "MLP", AFLoraConfig, {"target_modules": ["lin0"]}),
    ("MLP, the other", "MLP", AFLoraConfig, {"target_modules": ["lin1"]}),
    ("MLP, both", "MLP", AFLoraConfig, {"target_modules": ["lin0", "lin1"], "aflora_alpha": 8.0}),
    (
        "MLP, whole module",
        "MLP",
        AFLoraConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
    ("MLP, dropout", "MLP", AFLoraConfig, {"target_modules": ["lin0"], "aflora_dropout": 0.1}),
    (
        "Conv1D",
        "EmbConv1D",
        AFLoraConfig,
        # PEFT's rate for this model is tuned to LoRA; a larger d lets A move as far in three steps.
        {"target_modules": ["conv1d"], "fan_in_fan_out": True, "d_initial": 5.0},
    ),
]
# Asks for an adapter that trains biases, which AFLoRA refuses (`test_aflora.py`).
NOT_OURS = ("test_adding_multiple_adapters_with_bias_raises",)


def _theirs() -> Any:
    # Imported at the top of PEFT's helpers, for tests of pictures that are not run here.
    diffusers = types.ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault("diffusers", diffusers)
    sys.path.insert(0, str(SOURCES))
    sys.modules.pop("tests", None)
    import tests.test_custom_models as module

    return module


def _cases(function: Any) -> Iterator[Any]:
    """The marks of a test, its cases replaced by ours."""
    for mark in function.pytestmark:
        if mark.name == "parametrize" and mark.args[0].endswith("config_cls, config_kwargs"):
            yield pytest.mark.parametrize(mark.args[0], CASES).mark
        else:
            yield mark


theirs = _theirs()


class TestAFLora(theirs.TestPeftCustomModel):  # type: ignore[name-defined,misc]
    """What PEFT asks of every method, of ours."""


for _name, _test in vars(theirs.TestPeftCustomModel).items():
    marks = getattr(_test, "pytestmark", [])
    ours = any("config_cls, config_kwargs" in str(mark.args[:1]) for mark in marks)
    if ours and _name not in NOT_OURS:
        _test.pytestmark = list(_cases(_test))
    elif _name.startswith("test_"):
        setattr(TestAFLora, _name, None)  # of one other method
