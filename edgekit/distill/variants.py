"""What an ablation compares, as data: a base, and variants that each change a little of it.

description = "…"
[base]                          # a recipe's keys, `description` and `tuning` left out
transfer = { tokens = 100_000, lr = 1e-2 }
[variants."no convolution"]     # keys of a recipe that replace the base's
lawcat.conv = false
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from edgekit.config import dump, load
from edgekit.distill.checkpoint import differing_keys
from edgekit.distill.recipe import Recipe
from edgekit.errors import UsageError
from edgekit.utf8 import read_text

__all__ = ["BASE", "Variants", "changes", "load_variants"]

BASE = "base"
SHIPPED = "ablations.toml"
MAY_CHANGE = ("mixer", "lawcat.", "lolcats.", "transfer.lr", "transfer.gate_lr")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variants:
    """Recipes that are to be compared at equal tokens.

    Attributes:
        description: one sentence.
        recipes: by name, the base first under `BASE`; only their first stages count.
    """

    description: str
    recipes: dict[str, Recipe]

    @property
    def base(self) -> Recipe:
        """What the others are changed from."""
        return self.recipes[BASE]


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    description: str
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]


def load_variants(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Variants:
    """The variants in a TOML file.

    Args:
        path: None: those that edgekit's defaults rest on.
        overrides: dotted keys and values that replace the base's, such as `transfer.tokens`.

    Raises:
        UsageError: for an unreadable file, a key or value that is not allowed, or a variant that
            changes nothing, or more than its mixer and rates.
    """
    where = str(path or SHIPPED)
    file = load(_File, _toml(path, where), where=where, error=UsageError)
    if not file.variants or BASE in file.variants:
        raise UsageError(f"{where}: give one or more [variants.NAME], none of them called {BASE}")
    common = {"description": file.description, "tuning": {"tokens": 0, "lr": 0.0}}
    base = _merged(_merged(common, file.base), _nested(overrides or {}))
    recipes = {BASE: _recipe(base, BASE, where)}
    for name, changed in file.variants.items():
        recipes[name] = _recipe(_merged(base, changed), name, where)
        _check(name, changes(recipes[BASE], recipes[name]), where)
    return Variants(description=file.description, recipes=recipes)


def changes(base: Recipe, variant: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which they differ, with the base's value and the variant's."""
    return {k: v for k, v in differing_keys(dump(base), dump(variant)).items() if k != "name"}


def _check(name: str, changed: Mapping[str, object], where: str) -> None:
    if "|" in name or not name.strip():
        raise UsageError(f"{where}: variant {name!r}; allowed: a name without |")
    if not changed:
        raise UsageError(f"{where}: variant {name!r} changes nothing")
    barred = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if barred:
        raise UsageError(
            f"{where}: variant {name!r} changes {barred[0]}; allowed: {', '.join(MAY_CHANGE)} "
            "(the rest is the same for all, so that only the mixers differ)"
        )


def _toml(path: Path | None, where: str) -> dict[str, Any]:
    shipped = resources.files("edgekit.distill") / SHIPPED
    try:
        text = shipped.read_text(encoding="utf-8") if path is None else read_text(path)
        return tomllib.loads(text)
    except (OSError, tomllib.TOMLDecodeError) as cause:
        raise UsageError(f"variants {where}: cannot be read ({cause})") from cause


def _recipe(data: Mapping[str, Any], name: str, where: str) -> Recipe:
    told = f"{where}: {name}"
    return load(Recipe, {**data, "name": name}, where=told, error=UsageError)


def _merged(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with the values of `over`, table by table."""
    merged = dict(table)
    for key, value in over.items():
        before = table.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _merged(before, value)
        merged[key] = value
    return merged


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = _merged(nested, value)
    return nested
