"""Frozen dataclasses to and from plain JSON/TOML values; an unknown or missing key is an error."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from edgekit.errors import EdgekitError

__all__ = ["dump", "load"]

C = TypeVar("C")


def dump(value: Any) -> Any:
    """Turn a dataclass (or a container of them) into JSON-ready dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: dump(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): dump(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [dump(item) for item in value]
    return value


def load(cls: type[C], data: Any, *, where: str, error: type[EdgekitError] = EdgekitError) -> C:
    """Build the dataclass `cls` from plain data.

    Args:
        cls: a dataclass type; nested dataclasses, tuples, dicts and optionals are followed.
        data: what `json.load` or `tomllib.load` returned.
        where: named in the error, such as a file name.
        error: the exception class to raise.

    Raises:
        EdgekitError: (or `error`) for a wrong type, an unknown key or a missing key.
    """
    try:
        return typing.cast(C, _build(cls, data, where))
    except (TypeError, ValueError) as cause:
        raise error(str(cause)) from cause


def _build(kind: Any, data: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), data, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _build_union(args, data, where)
    if origin is tuple:
        return _build_tuple(args, data, where)
    if origin is dict:
        if not isinstance(data, Mapping):
            raise ValueError(f"{where}: expected a table, got {data!r}")
        return {key: _build(args[1], item, f"{where}: {key}") for key, item in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if origin is typing.Literal:
        if data not in args:
            raise ValueError(f"{where}: {data!r} given; allowed: {', '.join(map(str, args))}")
        return data
    if kind is Any or _is_a(data, kind):
        return data
    raise ValueError(f"{where}: expected {kind.__name__}, got {data!r}")


def _is_a(data: Any, kind: type) -> bool:
    if isinstance(data, bool):
        return kind is bool
    return isinstance(data, kind)


def _build_union(args: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in args:
        return None
    reasons: list[str] = []
    for option in (arg for arg in args if arg is not type(None)):
        try:
            return _build(option, data, where)
        except (TypeError, ValueError) as cause:
            reasons.append(str(cause))
    raise ValueError("; or ".join(reasons))


def _build_tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise ValueError(f"{where}: expected a list, got {data!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_build(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if len(args) != len(data):
        raise ValueError(f"{where}: expected {len(args)} items, got {len(data)}")
    return tuple(_build(arg, item, where) for arg, item in zip(args, data, strict=True))


def _build_dataclass(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected a table, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(fields))}")
    required = (
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(f"{where}: the key {missing[0]!r} is missing")
    hints = get_type_hints(cls)
    built = {key: _build(hints[key], item, f"{where}: {key}") for key, item in data.items()}
    return cls(**built)
