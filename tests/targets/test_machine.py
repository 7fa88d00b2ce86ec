"""Detection, on file systems that describe other machines."""

import platform
from pathlib import Path

import pytest

from edgekit import targets

CPUS = {
    "amx": ("GenuineIntel", "fma avx2 avx512_vnni amx_tile amx_int8", "intel-cpu-amx"),
    "vnni": ("GenuineIntel", "fma avx2 avx512f avx512_vnni", "intel-cpu-avx512-vnni"),
    "client": ("GenuineIntel", "fma avx2 avx_vnni", "intel-cpu-avx2"),
    "old": ("GenuineIntel", "sse4_2 avx", "generic-x86"),
    "another-vendor": ("AuthenticAMD", "fma avx2 avx512_vnni", "generic-x86"),
}
PCI = "sys/devices/pci0000:00"


def machine(root: Path, vendor: str, flags: str) -> Path:
    (root / "proc").mkdir()
    cpu = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n"
    (root / "proc/cpuinfo").write_text(f"{cpu}\nprocessor\t: 1\n")
    return root


def add_device(root: Path, kind: str, address: str, vendor: str = "0x8086") -> None:
    """A device as the kernel shows it: `sys/class/drm/card0/device` leads to its PCI address."""
    device = root / PCI / address
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    entry = root / "sys/class" / kind
    entry.mkdir(parents=True)
    (entry / "device").symlink_to(device)


def laptop(root: Path) -> Path:
    """A Core Ultra with everything."""
    machine(root, "GenuineIntel", "fma avx2 avx_vnni")
    for kind in ("cpu_core", "cpu_atom"):
        (root / "sys/devices" / kind).mkdir(parents=True)
    add_device(root, "drm/card0", "0000:00:02.0")
    add_device(root, "drm/card1", "0000:03:00.0")
    add_device(root, "accel/accel0", "0000:00:0b.0")
    return root


@pytest.mark.parametrize(("vendor", "flags", "expected"), CPUS.values(), ids=CPUS)
def test_cpu_is_told_by_its_flags(vendor: str, flags: str, expected: str, tmp_path: Path) -> None:
    root = machine(tmp_path, vendor, flags)
    assert list(targets.found(root)) == [expected]
    assert targets.detect(root) == expected


def test_everything_of_a_laptop_is_found_and_its_cpu_is_taken(tmp_path: Path) -> None:
    root = laptop(tmp_path)
    everything = ["intel-cpu-hybrid", "intel-igpu", "intel-arc", "intel-npu"]
    assert list(targets.found(root)) == everything
    assert targets.detect(root) == "intel-cpu-hybrid"


def test_devices_of_other_vendors_are_not_intels(tmp_path: Path) -> None:
    root = machine(tmp_path, "AuthenticAMD", "fma avx2")
    add_device(root, "drm/card0", "0000:01:00.0", vendor="0x10de")
    add_device(root, "accel/accel0", "0000:c5:00.1", vendor="0x1022")
    assert list(targets.found(root)) == ["generic-x86"]


def test_connectors_of_a_card_are_no_cards(tmp_path: Path) -> None:
    root = machine(tmp_path, "GenuineIntel", "fma avx2")
    add_device(root, "drm/card0", "0000:00:02.0")
    connector = root / "sys/class/drm/card0-HDMI-A-1"
    connector.mkdir()
    (connector / "device").symlink_to(root / "sys/class/drm/card0")
    assert list(targets.found(root)) == ["intel-cpu-avx2", "intel-igpu"]


def test_arm_is_told_by_its_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert targets.detect(tmp_path) == "generic-arm"


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("x86_64", "generic-x86"), ("AMD64", "generic-x86"), ("arm64", "generic-arm")],
)
def test_without_a_kernel_that_tells_the_architecture_decides(
    architecture: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    assert targets.detect(tmp_path) == expected
    assert targets.memory_bytes(tmp_path) is None


def test_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16384 kB\nMemFree:  1 kB\n")
    assert targets.memory_bytes(tmp_path) == 16 * 2**20


def test_what_is_found_here_exists() -> None:
    assert set(targets.found()) <= set(targets.names())
