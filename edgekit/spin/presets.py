"""SPIN's published settings by name, as data."""

import functools
import tomllib
from importlib import resources
from typing import Any

from edgekit.config import load
from edgekit.errors import UsageError
from edgekit.models.spin import SpinConfig

__all__ = ["preset", "preset_names"]


def preset_names() -> list[str]:
    """All of them; `presets.toml` says where they come from."""
    return sorted(_file()["presets"])


def preset(name: str, **overrides: Any) -> SpinConfig:
    """A published setting.

    Args:
        name: of `preset_names()`.
        overrides: fields of `SpinConfig` that replace the preset's; `suppress` replaces `keep`.

    Raises:
        UsageError: for an unknown name, or a value that is not allowed.
    """
    if name not in _file()["presets"]:
        raise UsageError(f"preset {name!r} is unknown; known: {', '.join(preset_names())}")
    values = {**_file()["defaults"], **_file()["presets"][name]}
    if overrides.get("suppress") is not None:
        values["keep"] = None
    return load(SpinConfig, {**values, **overrides}, where=f"preset {name}", error=UsageError)


@functools.cache
def _file() -> dict[str, dict[str, Any]]:
    file = resources.files("edgekit.spin") / "presets.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
