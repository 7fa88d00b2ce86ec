from dataclasses import replace
from pathlib import Path

import pytest

from edgekit import targets
from edgekit.errors import UsageError

CASES = {
    "amx": ("GenuineIntel", "fma avx2 avx512_vnni amx_tile amx_int8", "intel-cpu-amx"),
    "vnni": ("GenuineIntel", "fma avx2 avx512f avx512_vnni", "intel-cpu-avx512-vnni"),
    "client": ("GenuineIntel", "fma avx2 avx_vnni", "intel-cpu-avx2"),
    "old": ("GenuineIntel", "sse4_2 avx", "generic-x86"),
    "another-vendor": ("AuthenticAMD", "fma avx2 avx512_vnni", "generic-x86"),
}


@pytest.mark.parametrize("name", targets.names())
def test_profile_loads_and_names_where_each_setting_comes_from(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert min(target.prefill_block.values()) >= 1


def test_what_was_measured_elsewhere_is_not_called_measured() -> None:
    """So far nothing was measured on an Intel CPU."""
    for name in set(targets.names()) - {"generic-x86"}:
        kinds = {text.split(":")[0] for text in targets.load(name).provenance.values()}
        assert "measured here" not in kinds, name
    assert "AMD EPYC" in targets.load("generic-x86").provenance["prefill_block"]


def test_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'pentium' is unknown; known: generic-x86, intel-cpu"):
        targets.load("pentium")


@pytest.mark.parametrize(("vendor", "flags", "expected"), CASES.values(), ids=CASES)
def test_detect_reads_the_cpu_flags(vendor: str, flags: str, expected: str, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\nprocessor: 1\n"
    )
    assert targets.detect(cpuinfo) == expected


def test_detect_without_cpuinfo_falls_back(tmp_path: Path) -> None:
    assert targets.detect(tmp_path / "none") == "generic-x86"


def test_target_detected_here_exists() -> None:
    assert targets.detect() in targets.names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "tflite"}, "engine = 'tflite'; allowed: openvino, onnx"),
        ({"weights": "int3"}, "weights = 'int3'"),
        ({"prefill_block": {"onnx": 512}}, "prefill_block.openvino"),
        ({"group_size": 0}, "group_size = 0"),
        ({"threads": -1}, "threads = -1"),
        ({"provenance": {"engine": "open"}}, "provenance must name each setting"),
    ],
    ids=["engine", "weights", "block", "group", "threads", "provenance"],
)
def test_malformed_profile_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(targets.load("generic-x86"), **change)  # type: ignore[arg-type]


def test_provenance_must_be_of_a_known_kind() -> None:
    target = targets.load("generic-x86")
    hearsay = {**target.provenance, "threads": "hearsay"}
    with pytest.raises(UsageError, match=r"provenance.threads = 'hearsay'"):
        replace(target, provenance=hearsay)
