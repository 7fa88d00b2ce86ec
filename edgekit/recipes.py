"""Recipes: TOML files in a package's folder `recipes`, or the user's own, as dataclasses."""

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from edgekit.config import load
from edgekit.errors import UsageError
from edgekit.utf8 import read_text

__all__ = ["load_recipe", "recipe_names"]

R = TypeVar("R")


def recipe_names(package: str) -> list[str]:
    """The recipes that ship in `package`."""
    folder = resources.files(package) / "recipes"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


def load_recipe(
    cls: type[R], package: str, spec: str | Path, overrides: Mapping[str, Any] | None = None
) -> R:
    """The recipe called `spec`, or in the TOML file `spec`.

    Args:
        cls: a dataclass with a field `name`, which the file need not give.
        package: whose recipes they are.
        spec: a name of `recipe_names(package)`, or a path that ends in `.toml`.
        overrides: dotted keys and values that replace the file's, such as `transfer.tokens`.

    Raises:
        UsageError: for an unknown name, an unreadable file, or a key or value that is not allowed.
    """
    path = Path(spec)
    text = read_text(path) if path.suffix == ".toml" else _shipped(package, str(spec))
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as cause:
        raise UsageError(f"recipe {spec}: {cause}") from cause
    for key, value in (overrides or {}).items():
        _set(data, key.split("."), value)
    return load(cls, {"name": path.stem, **data}, where=f"recipe {path.stem}", error=UsageError)


def _shipped(package: str, name: str) -> str:
    if name not in recipe_names(package):
        known = ", ".join(recipe_names(package))
        raise UsageError(f"recipe {name!r} is unknown; known: {known}; or give a .toml file")
    file = resources.files(package) / "recipes" / f"{name}.toml"
    return file.read_text(encoding="utf-8")


def _set(table: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UsageError(f"{'.'.join(keys)} given; {key} is a value, not a table")
    table[keys[-1]] = value
