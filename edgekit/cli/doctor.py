"""Check this machine: Python, packages against the ranges edgekit needs, engines, devices, CPU.

Exits with 1 only if no engine works.
"""

import argparse
import importlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from edgekit import __version__, targets
from edgekit.cli.arguments import add_json
from edgekit.cli.output import as_json, as_table

__all__ = ["HELP", "add_arguments", "run"]

HELP = "check packages, engines and devices of this machine"
DISTRIBUTION = "edgekit-lm"
# Installed beside edgekit without their dependencies, so their own pins are checked here.
FOREIGN = ("optimum-intel",)
CPU_FLAGS = (
    "sse4_2",
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One distribution that edgekit can use; `extras` is empty where it always needs it."""

    name: str
    installed: str | None
    allowed: str
    extras: tuple[str, ...]
    ok: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineHealth:
    """An inference engine and what it can run on, or why it cannot."""

    name: str
    devices: tuple[str, ...]
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything found; `problems` says for each what to do."""

    edgekit: str
    python: str
    cpu: str
    cpu_count: int
    cpu_flags: tuple[str, ...]
    target: str
    engines: tuple[EngineHealth, ...]
    packages: tuple[Package, ...]
    problems: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; returns 1 if no engine works."""
    found = diagnose()
    print(as_json(found) if args.json else _report(found))
    return 0 if any(engine.error is None for engine in found.engines) else 1


def diagnose() -> Diagnosis:
    """Look at this machine and installation."""
    facts = targets.cpu_facts()
    flags = set(facts.get("flags", "").split())
    engines = (_engine("openvino", _openvino_devices), _engine("onnx", _onnx_providers))
    packages = tuple(_packages())
    return Diagnosis(
        edgekit=__version__,
        python=platform.python_version(),
        cpu=facts.get("model name") or platform.machine(),
        cpu_count=os.cpu_count() or 0,
        cpu_flags=tuple(flag for flag in CPU_FLAGS if flag in flags),
        target=targets.detect(),
        engines=engines,
        packages=packages,
        problems=tuple(_problems(engines, packages)),
    )


def _engine(name: str, devices: Callable[[], tuple[str, ...]]) -> EngineHealth:
    try:
        return EngineHealth(name=name, devices=devices(), error=None)
    except (ImportError, OSError, RuntimeError) as cause:
        return EngineHealth(name=name, devices=(), error=" ".join(str(cause).split()))


def _openvino_devices() -> tuple[str, ...]:
    return tuple(importlib.import_module("openvino").Core().available_devices)


def _onnx_providers() -> tuple[str, ...]:
    return tuple(importlib.import_module("onnxruntime").get_available_providers())


def _packages() -> Iterator[Package]:
    """Each distribution that edgekit's own metadata names, once, with the extras that want it."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    wanted: dict[str, tuple[Requirement, set[str]]] = {}
    for text in metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        name = str(canonicalize_name(requirement.name))
        extra = _extra(text)
        if name == DISTRIBUTION or extra == "dev":
            continue
        merged, extras = wanted.setdefault(name, (requirement, set()))
        merged.specifier &= requirement.specifier
        extras.add(extra)
    for name, (requirement, extras) in sorted(wanted.items()):
        installed = _version(name)
        yield Package(
            name=name,
            installed=installed,
            allowed=str(requirement.specifier),
            extras=() if "" in extras else tuple(sorted(extras)),
            ok=installed is not None
            and requirement.specifier.contains(installed, prereleases=True),
        )


def _extra(requirement: str) -> str:
    """`convert` of `torch>=2; extra == "convert"`, or nothing."""
    _, found, rest = requirement.partition("extra == ")
    return rest.strip().strip("\"'") if found else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _problems(engines: tuple[EngineHealth, ...], packages: tuple[Package, ...]) -> Iterator[str]:
    if all(engine.error for engine in engines):
        yield f'no engine works: pip install "{DISTRIBUTION}[openvino]" or "{DISTRIBUTION}[onnx]"'
    for package in packages:
        wanted = f"{package.name}{package.allowed}"
        if package.installed is None and not package.extras:
            yield f'{package.name} is missing: pip install "{wanted}"'
        elif package.installed is not None and not package.ok:
            yield f'{package.name} {package.installed} is out of range: pip install "{wanted}"'
    for engine, package_name in zip(engines, ("openvino", "onnxruntime"), strict=True):
        if engine.error and _version(package_name):
            yield f"{package_name} is installed but fails ({engine.error}): reinstall it"
    for name in FOREIGN:
        yield from _conflicts(name)


def _conflicts(name: str) -> Iterator[str]:
    """Installed packages outside the range that the distribution `name` asks for."""
    from packaging.requirements import Requirement

    version = _version(name)
    for text in (metadata.requires(name) or ()) if version else ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed and not requirement.specifier.contains(installed, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield f'{name} {version} wants {wanted}, not {installed}: pip install "{wanted}"'


def _report(found: Diagnosis) -> str:
    machine = [
        ("edgekit", found.edgekit),
        ("python", found.python),
        ("cpu", f"{found.cpu}, {found.cpu_count} CPUs"),
        ("cpu flags", " ".join(found.cpu_flags) or "-"),
        ("target", found.target),
        *((f"engine {e.name}", e.error or ", ".join(e.devices)) for e in found.engines),
    ]
    packages = [
        (p.name, p.installed or "not installed", p.allowed, ", ".join(p.extras) or "always")
        for p in found.packages
    ]
    table = as_table(packages, ("package", "installed", "allowed", "wanted by"))
    problems = [f"problem: {line}" for line in found.problems] or ["no problems found"]
    return "\n".join([as_table(machine), "", table, "", *problems])
