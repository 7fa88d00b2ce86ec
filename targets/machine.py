"""Which targets this machine has, from what its kernel says: no engine is loaded.

Linux alone says it all; elsewhere the architecture decides between the generic targets.
"""

import platform
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_facts", "detect", "found", "memory_bytes"]

ROOT = Path("/")
CPUINFO = Path("proc/cpuinfo")
FALLBACK = "generic-x86"
ARM, ARM_MACHINES = "generic-arm", ("aarch64", "arm64")
# Best first: a CPU is the first profile whose flags it all has.
INTEL_CPUS = {
    "intel-cpu-amx": {"amx_tile", "amx_int8"},
    "intel-cpu-avx512-vnni": {"avx512_vnni"},
    "intel-cpu-avx2": {"avx2", "fma"},
}
HYBRID = "intel-cpu-hybrid"
CORE_KINDS = ("cpu_core", "cpu_atom")  # the kernel counts events of P and E cores apart
INTEL = "0x8086"
INTEGRATED = "0000:00:02.0"  # where every integrated GPU of Intel sits on the PCI bus


def detect(root: Path = ROOT) -> str:
    """What `--target auto` takes: this machine's CPU; the other devices are asked for by name.

    Args:
        root: of the file system that describes the machine.
    """
    return next(found(root))


def found(root: Path = ROOT) -> Iterator[str]:
    """Every target that this machine has, its CPU first, then its GPUs and its NPU."""
    yield _cpu(root)
    devices = [path.resolve() for path in sorted(root.glob("sys/class/drm/card[0-9]*/device"))]
    gpus = {path.name for path in devices if _is_intel(path)}
    if INTEGRATED in gpus:
        yield "intel-igpu"
    if gpus - {INTEGRATED}:
        yield "intel-arc"
    if any(_is_intel(path) for path in root.glob("sys/class/accel/accel*/device")):
        yield "intel-npu"


def memory_bytes(root: Path = ROOT) -> int | None:
    """This machine's memory; None where the system does not tell."""
    path = root / "proc/meminfo"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    totals = [line.split()[1] for line in lines if line.startswith("MemTotal:")]
    return 1024 * int(totals[0]) if totals else None


def cpu_facts(cpuinfo: Path = ROOT / CPUINFO) -> dict[str, str]:
    """The fields of the first CPU in `cpuinfo`: `vendor_id`, `model name`, `flags` and so on."""
    if not cpuinfo.is_file():
        return {}
    first = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu(root: Path) -> str:
    facts = cpu_facts(root / CPUINFO)
    if "CPU implementer" in facts or (not facts and _is_arm()):
        return ARM
    if facts.get("vendor_id") != "GenuineIntel":
        return FALLBACK
    flags = set(facts.get("flags", "").split())
    fitting = [name for name, needed in INTEL_CPUS.items() if needed <= flags]
    if fitting and all((root / "sys/devices" / kind).is_dir() for kind in CORE_KINDS):
        return HYBRID
    return fitting[0] if fitting else FALLBACK


def _is_intel(device: Path) -> bool:
    vendor = device / "vendor"
    return vendor.is_file() and vendor.read_text(encoding="ascii").strip() == INTEL


def _is_arm() -> bool:
    """By what Python says, where the kernel says nothing."""
    return platform.machine().lower() in ARM_MACHINES
