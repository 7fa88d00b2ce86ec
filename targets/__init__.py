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
from edgekit.targets.schema import Target

__all__ = ["Target", "cpu_facts", "detect", "load", "names"]

FOLDER = Path(__file__).parent
FALLBACK = "generic-x86"
# Best first: a CPU is the first profile whose flags it all has.
INTEL_CPUS = {
    "intel-cpu-amx": {"amx_tile", "amx_int8"},
    "intel-cpu-avx512-vnni": {"avx512_vnni"},
    "intel-cpu-avx2": {"avx2", "fma"},
}


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


def detect(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The target of this machine's CPU; anything that is not a known Intel CPU is `generic-x86`.

    Args:
        cpuinfo: the Linux kernel's description of the CPU.
    """
    facts = cpu_facts(cpuinfo)
    if facts.get("vendor_id") != "GenuineIntel":
        return FALLBACK
    flags = set(facts.get("flags", "").split())
    fitting = (name for name, needed in INTEL_CPUS.items() if needed <= flags)
    return next(fitting, FALLBACK)


def cpu_facts(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The fields of the first CPU in `cpuinfo`: `vendor_id`, `model name`, `flags` and so on."""
    if not cpuinfo.is_file():
        return {}
    first = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
