"""`convert --student`: a student reaches both engines; one that does not fit leaves no trace."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekit as package
from edgekit.bundle import read_manifest
from edgekit.errors import SourceError, UsageError
from edgekit.export.pipeline import ConvertReport, convert
from edgekit.runtime import load
from edgekit.sources.base import sha256_of
from edgekit.testing import write_tiny_student

Tiny = Callable[..., Path]
Edgekit = Callable[..., Any]
ENGINES = ("openvino", "onnx")
LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "lawcat": (("lawcat",) * 3, {}),
    "kv-head": (("lawcat",) * 3, {"state_sharing": "kv_head", "gate_bias_init": 4.0}),
    "rope": (("lawcat",) * 3, {"position": "rope"}),
    "hybrid": (("lawcat", "softmax", "lawcat"), {"conv_size": 3, "feature_dim": 4}),
}
HYBRID, QUICK = LAYOUTS["hybrid"][0], ("--no-verify", "--target", "generic-x86")


def made(tmp_path: Path, base: Path, layout: str) -> Path:
    mixers, options = LAYOUTS[layout]
    return write_tiny_student(tmp_path / "student", base, mixers, **options)


def quick(source: Path, out: Path, student: Path | str, **options: Any) -> ConvertReport:
    options = {"target": "generic-x86", "weights": "fp32", **options}
    return convert(source, out, student=student, **options)


@pytest.mark.parametrize(
    ("family", "layout"), [*(("qwen3", layout) for layout in LAYOUTS), ("qwen2", "hybrid")]
)
def test_round_trip(tiny_checkpoint: Tiny, tmp_path: Path, family: str, layout: str) -> None:
    base, out = tiny_checkpoint(family), tmp_path / "out"
    report = quick(base, out, made(tmp_path, base, layout))
    for engine in ENGINES:
        found = report.verification[engine]
        assert found.max_abs <= 1e-3
        assert found.greedy_equal == found.decode_steps == 32
    texts = {e: load(out, engine=e).generate("The", max_new_tokens=8) for e in ENGINES}
    assert texts["openvino"] == texts["onnx"] != ""
    manifest = read_manifest(out)
    assert manifest.mixers == LAYOUTS[layout][0]
    assert manifest.constant_memory == ("softmax" not in manifest.mixers)


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_narrow_weights_are_held_to_the_bounds_of_a_trained_model(
    tiny_checkpoint: Tiny, tmp_path: Path, weights: str
) -> None:
    base = tiny_checkpoint("qwen3")
    report = quick(base, tmp_path / "out", made(tmp_path, base, "hybrid"), weights=weights)
    highest = {"fp16": 1e-3, "int8": 0.05, "int4": 0.5}[weights]
    for found in report.verification.values():
        assert 0 <= found.kl < highest


def test_the_manifest_says_which_student(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base, out = tiny_checkpoint("llama"), tmp_path / "out"
    student = made(tmp_path, base, "kv-head")
    report = package.convert(base, out, student=student, weights="fp32", verify=False)
    assert report.notes == ()
    manifest = read_manifest(out)
    steps = {step["step"]: step for step in manifest.pipeline}
    assert "mixers" not in steps  # those are untrained
    assert list(steps)[:3] == ["load", "student", "weights"]
    step = steps["student"]
    assert (step["name"], step["recipe"]) == ("tiny", "none")
    assert step["base"] == manifest.source["sha256"]
    assert step["sha256"] == sha256_of([student / "student.json"])
    assert [stage["tokens"] for stage in step["training"]] == [1_200_000, 300_000]
    assert step["lawcat"]["state_sharing"] == "kv_head"
    assert str(tmp_path) not in (out / "edgekit.json").read_text()


def test_the_differences_count(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Two students of one teacher are two models."""
    base = tiny_checkpoint("llama")
    hashes = set()
    for rank in (1, 2):
        student = write_tiny_student(tmp_path / f"s{rank}", base, HYBRID, rank=rank)
        report = quick(base, tmp_path / f"o{rank}", student, formats=["onnx"], verify=False)
        hashes.add(read_manifest(report.out).fingerprint)
    assert len(hashes) == 2


# ---- what is refused, in one line and without a trace


@pytest.mark.parametrize(
    "conflict",
    [("--mixer", "lawcat"), ("--mixer", "softmax"), ("--softmax-layers", "1"),
     ("--state-sharing", "kv_head")],
    ids=" ".join,
)  # fmt: skip
def test_what_the_student_says_is_not_said_twice(
    edgekit: Edgekit, checkpoint: Path, tmp_path: Path, out: Path, conflict: tuple[str, str]
) -> None:
    student = made(tmp_path, checkpoint, "hybrid")
    done = edgekit("convert", checkpoint, "-o", out, "--student", student, *conflict, *QUICK)
    assert (done.code, len(done.err)) == (2, 1)
    assert "which says them itself; leave them out" in done.err[0]
    assert os.listdir(out.parent) == []


def another_base(student: Path) -> None:
    edit(student, base={"kind": "hf-directory", "name": "other", "sha256": "f" * 64})


def layer_count(student: Path) -> None:
    edit(student, mixers=["lawcat"])


def foreign(student: Path) -> None:
    shutil.rmtree(student)
    student.mkdir()
    (student / "model.bin").touch()


def gone(student: Path) -> None:
    shutil.rmtree(student)


def cut(student: Path) -> None:
    path = student / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_shapes(student: Path) -> None:
    edit(student, lawcat={"conv_size": 4})


def other_mixers(student: Path) -> None:
    edit(student, mixers=["lawcat"] * 3)


def edit(student: Path, **changes: Any) -> None:
    path = student / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MISFITS: dict[Callable[[Path], None], str] = {
    another_base: "was made from other (sha256 ffffffffffff), not from tiny-llama",
    layer_count: "has 1 mixers, tiny-llama",
    foreign: "not an edgekit student (student.json is missing)",
    gone: "no such student; allowed: a directory that `edgekit distill` wrote",
    cut: "student.safetensors: damaged",
    other_shapes: "'model.layers.0.self_attn.conv_q.weight' is [64, 3], the model asks for [64, 4]",
    other_mixers: "has no tensor 'model.layers.1.self_attn.conv_q.weight'",
}


@pytest.mark.parametrize("damage", MISFITS)
def test_a_student_that_does_not_fit(
    edgekit: Edgekit,
    checkpoint: Path,
    tmp_path: Path,
    out: Path,
    damage: Callable[[Path], None],
) -> None:
    student = made(tmp_path, checkpoint, "hybrid")
    damage(student)
    done = edgekit("convert", checkpoint, "-o", out / "deep", "--student", student, *QUICK)
    assert (done.code, len(done.err)) == (1, 1)
    assert MISFITS[damage] in done.err[0]
    assert os.listdir(out.parent) == []


def test_an_unknown_name_lists_the_known_ones(tiny_checkpoint: Tiny, out: Path) -> None:
    with pytest.raises(SourceError, match=r"no-such: no such student; .* ships with edgekit \("):
        quick(tiny_checkpoint("llama"), out, "no-such")
    with pytest.raises(UsageError, match="leave them out"):
        quick(tiny_checkpoint("llama"), out, "no-such", softmax_layers=(0,))
