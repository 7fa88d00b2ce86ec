"""Device profiles as data: one TOML file per target, and the guess which one this machine is.

Example:
    >>> from edgekit import targets
    >>> targets.load("generic-x86").prefill_block["onnx"]
    512
"""

import tomllib
from pathlib import Path

from edgekit import config
from edgekit.errors import UsageError
from edgekit.targets.machine import cpu_facts, detect, found, memory_bytes
from edgekit.targets.schema import GRAPHS, Target
from edgekit.targets.serving import check_serves, fitting_graph

__all__ = [
    "GRAPHS",
    "Target",
    "check_serves",
    "cpu_facts",
    "detect",
    "fitting_graph",
    "found",
    "load",
    "memory_bytes",
    "names",
]

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Every known target."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Target:
    """The profile `name`.

    Raises:
        UsageError: if there is no such target, or its file is malformed.
    """
    if name not in names():
        raise UsageError(f"target {name!r} is unknown; known: {', '.join(names())}")
    path = FOLDER / f"{name}.toml"
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    return config.load(Target, {"name": name, **data}, where=path.name, error=UsageError)
