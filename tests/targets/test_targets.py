from dataclasses import replace
from pathlib import Path

import pytest

from edgekit import targets
from edgekit.errors import UsageError

ISSUED = {
    "generic-arm",
    "generic-x86",
    "intel-arc",
    "intel-cpu-amx",
    "intel-cpu-avx2",
    "intel-cpu-avx512-vnni",
    "intel-cpu-hybrid",
    "intel-igpu",
    "intel-npu",
}


def test_every_device_has_its_profile() -> None:
    assert set(targets.names()) == ISSUED


@pytest.mark.parametrize("name", targets.names())
def test_profile_loads_and_names_where_each_setting_comes_from(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert min(target.prefill_block.values()) >= 1


@pytest.mark.parametrize("name", targets.names())
def test_what_was_measured_says_on_which_machine(name: str) -> None:
    """So far nothing was measured on hardware of Intel."""
    provenance = targets.load(name).provenance
    measured = {key: text for key, text in provenance.items() if text.startswith("measured here")}
    assert all("AMD EPYC" in text for text in measured.values())
    if name != "generic-x86":  # speed is the device's own, rounding and memory are not
        assert set(measured) <= {"inference_precision", "memory_budget"}


def test_cpus_and_gpus_keep_the_state_in_f32() -> None:
    """In bf16 it drifts without bound; an NPU has nothing but f16."""
    precisions = {name: targets.load(name).inference_precision for name in targets.names()}
    assert precisions.pop("intel-npu") == "f16"
    assert set(precisions.values()) == {"f32"}


def test_only_an_npu_needs_fixed_shapes() -> None:
    static = [name for name in targets.names() if targets.load(name).graph == "static"]
    assert static == ["intel-npu"]


def test_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'pentium' is unknown; known: generic-arm, generic-x86"):
        targets.load("pentium")


def test_unknown_field_lists_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text('desciption = "a typing error"\n')
    monkeypatch.setattr(targets, "FOLDER", tmp_path)
    with pytest.raises(UsageError, match=r"unknown key 'desciption'; known: cache_dir, descrip"):
        targets.load("mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "tflite"}, "engine = 'tflite'; allowed: openvino, onnx"),
        ({"graph": "frozen"}, "graph = 'frozen'; allowed: dynamic, stepped, static"),
        ({"weights": "int3"}, "weights = 'int3'"),
        ({"inference_precision": "f8"}, "inference_precision = 'f8'; allowed: f32, f16, bf16"),
        ({"prefill_block": {"onnx": 512}}, "prefill_block.openvino"),
        ({"group_size": 0}, "group_size = 0"),
        ({"threads": -1}, "threads = -1"),
        ({"memory_budget": 1.5}, "memory_budget = 1.5; allowed: above 0, at most 1"),
        ({"hints": {"TURBO": "YES"}}, "hints = 'TURBO'; allowed: PERFORMANCE_HINT, "),
        ({"hints": {"PERFORMANCE_HINT": "FAST"}}, "hints.PERFORMANCE_HINT = 'FAST'; allowed: LAT"),
        ({"provenance": {"engine": "open"}}, "provenance must name each setting"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_malformed_profile_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(targets.load("generic-x86"), **change)  # type: ignore[arg-type]


def test_provenance_must_be_of_a_known_kind() -> None:
    target = targets.load("generic-x86")
    hearsay = {**target.provenance, "threads": "hearsay"}
    with pytest.raises(UsageError, match=r"provenance.threads = 'hearsay'"):
        replace(target, provenance=hearsay)


def test_cache_lies_in_the_users_own_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(targets.load("intel-npu").cache_path) == "/home/somebody/.cache/edgekit"
    assert targets.load("generic-x86").cache_path is None
