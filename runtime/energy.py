"""Energy of the processor packages, where Linux lets it be read (RAPL)."""

from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["energy_meter"]

ROOT = Path("/sys/class/powercap")


def energy_meter(root: Path = ROOT) -> Callable[[], float | None]:
    """A function that returns the joules since this call, or None where nobody may read them.

    All packages count, with everything that runs on them. A counter that starts again from zero,
    which happens after minutes, is noticed once between two calls.

    Args:
        root: the folder of the kernel's power capping zones.
    """
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        limits = {zone: _microjoules(zone / "max_energy_range_uj") for zone in zones}
        last = {zone: _microjoules(zone / "energy_uj") for zone in zones}
    except OSError:
        zones = []
    return _counter(limits, last) if zones else lambda: None


def _counter(limits: Mapping[Path, int], last: dict[Path, int]) -> Callable[[], float]:
    spent = 0

    def joules() -> float:
        nonlocal spent
        for zone, limit in limits.items():
            now = _microjoules(zone / "energy_uj")
            spent += (now - last[zone]) % (limit + 1)
            last[zone] = now
        return 1e-6 * spent

    return joules


def _microjoules(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))
