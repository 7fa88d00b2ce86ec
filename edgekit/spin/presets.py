"""SPIN's settings: those that were published, by name, and those of a user's file."""

import functools
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from edgekit.config import load
from edgekit.errors import UsageError
from edgekit.models.spin import SpinConfig
from edgekit.utf8 import read_text

__all__ = ["preset", "preset_names", "read_spin"]


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
        raise UsageError(
            f"preset {name!r} is unknown; known: {', '.join(preset_names())}, or a .toml file"
        )
    values = {**_file()["defaults"], **_file()["presets"][name]}
    if overrides.get("suppress") is not None:
        values["keep"] = None
    return load(SpinConfig, {**values, **overrides}, where=f"preset {name}", error=UsageError)


def read_spin(spec: str | Path) -> SpinConfig:
    """The settings that a user names.

    Args:
        spec: a TOML file with fields of `SpinConfig`, such as `edgekit spin calibrate` writes, or a
            name of `preset_names()`.

    Raises:
        UsageError: for an unknown name, an unreadable file, or a value that is not allowed.
    """
    path = Path(spec)
    if path.suffix != ".toml":
        return preset(str(spec))
    try:
        values = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as cause:
        raise UsageError(f"{path}: {cause}") from cause
    return load(SpinConfig, values, where=str(path), error=UsageError)


@functools.cache
def _file() -> dict[str, dict[str, Any]]:
    file = resources.files("edgekit.spin") / "presets.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
