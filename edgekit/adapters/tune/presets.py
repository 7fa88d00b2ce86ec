"""AFLoRA settings by name: for encoders, for decoders, and as the authors' code has them.

Example:
    >>> preset("encoder", task_type="SEQ_CLS")                        # doctest: +SKIP
    >>> TrainingArguments("out", **preset_training("glue-20"))        # doctest: +SKIP
"""

import functools
import tomllib
from importlib import resources
from typing import Any

from edgekit.adapters.aflora import AFLoraConfig
from edgekit.errors import UsageError

__all__ = ["preset", "preset_names", "preset_training"]


def preset_names() -> list[str]:
    """All of them; `presets.toml` describes each."""
    return sorted(_presets())


def preset(name: str, **overrides: Any) -> AFLoraConfig:
    """The adapter's configuration of a preset.

    Args:
        name: of `preset_names()`.
        overrides: fields of `AFLoraConfig` that replace the preset's, such as `task_type`.

    Raises:
        UsageError: for an unknown name, or a value that is not allowed.
    """
    return AFLoraConfig(**{**_preset(name)["adapter"], **overrides})


def preset_training(name: str) -> dict[str, Any]:
    """How a preset is trained, as arguments of transformers' `TrainingArguments`.

    Raises:
        UsageError: for an unknown name.
    """
    return dict(_preset(name)["training"])


def _preset(name: str) -> dict[str, Any]:
    found = _presets().get(name)
    if found is None:
        raise UsageError(f"preset {name!r} is unknown; known: {', '.join(preset_names())}")
    return dict(found)


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    file = resources.files("edgekit.adapters.tune") / "presets.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
