"""A student on disk: written, read, put into its teacher, and refused where it does not fit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekit.errors import BundleError, SourceError, UsageError
from edgekit.models.config import LawcatConfig
from edgekit.models.decoder import Decoder
from edgekit.sources import Source, open_source
from edgekit.sources.base import sha256_of
from edgekit.sources.student import (
    StageRecord,
    StudentManifest,
    apply_student,
    lowrank_pairs,
    lowrank_tensors,
    open_model,
    read_student,
    write_student,
)
from edgekit.staging import staged
from edgekit.testing import TOLERANCE, assert_close, write_tiny_student

Tiny = Callable[..., Path]
HYBRID = ("lawcat", "softmax", "lawcat")
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Tiny) -> Source:
    return open_source(tiny_checkpoint("qwen3"))


@pytest.fixture
def directory(teacher: Source, tmp_path: Path) -> Path:
    return write_tiny_student(tmp_path / "student", teacher.directory, HYBRID, gate_bias_init=4.0)


def manifest_of(teacher: Source, **changes: Any) -> StudentManifest:
    plain = StudentManifest(name="s", base=teacher.identity, mixers=("softmax",) * 3)
    return replace(plain, **changes)


def test_a_manifest_comes_back_as_it_was_written(teacher: Source, tmp_path: Path) -> None:
    stage = StageRecord(stage=1, steps=2, tokens=3, seconds=4.5, loss=0.25, device="cpu")
    manifest = manifest_of(
        teacher,
        mixers=HYBRID,
        lawcat=LawcatConfig(state_sharing="kv_head", gate_bias_init=4.0),
        recipe={"name": "general", "stages": [{"lr": 1e-2}]},
        data=({"name": "a.txt", "sha256": "0" * 64, "tokens": 17},),
        training=(stage,),
        metrics={"perplexity": 31.5},
        versions={"torch": "2.13"},
    )
    written = write_student(tmp_path, manifest, {f"{ATTENTION}.conv_q.weight": torch.ones(2, 2)})
    assert replace(written, files={}) == manifest
    found = read_student(tmp_path)
    assert found.manifest == written
    assert found.directory == tmp_path
    size = (tmp_path / "student.safetensors").stat().st_size
    assert found.manifest.files["student.safetensors"].size == size


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tensors_are_stored_narrow_and_read_wide(
    teacher: Source, tmp_path: Path, dtype: Any
) -> None:
    directory = write_tiny_student(tmp_path / "s", teacher.directory, HYBRID, dtype=dtype)
    stored = load_file(directory / "student.safetensors")
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    config, weights = apply_student(teacher, read_student(directory))
    for name in (f"{ATTENTION}.conv_q.weight", f"{ATTENTION}.q_proj.weight"):
        assert weights.tensor(name).dtype == torch.float32
    assert torch.equal(
        weights.tensor(f"{ATTENTION}.gate_up.bias"), stored[f"{ATTENTION}.gate_up.bias"].float()
    )
    assert config.mixers == HYBRID


def test_differences_are_folded_and_the_teacher_is_unchanged(
    teacher: Source, directory: Path
) -> None:
    names = set(teacher.weights)
    before = {name: teacher.weights.tensor(name).clone() for name in names}
    config, weights = apply_student(teacher, read_student(directory))
    stored = load_file(directory / "student.safetensors")
    changed = set()
    for name in names:
        stem = name.removesuffix(".weight")
        if f"{stem}.lowrank_a" in stored:
            a, b = stored[f"{stem}.lowrank_a"].double(), stored[f"{stem}.lowrank_b"].double()
            exact = before[name].double() + b @ a
            assert_close(name, exact, weights.tensor(name), ratio=TOLERANCE["float32"])
            changed.add(name)
        else:
            assert torch.equal(weights.tensor(name), before[name])
        assert torch.equal(teacher.weights.tensor(name), before[name])
    assert len(changed) == 2 * 4
    assert config.lawcat.gate_bias_init == 4.0
    held = list(weights)
    assert len(held) == len(set(held))
    assert not [name for name in held if "lowrank" in name]
    assert f"{ATTENTION}.q_proj.lowrank_a" not in weights
    assert set(held) >= names
    Decoder.from_store(config, weights)(torch.arange(9)[None])


def test_a_student_may_mix_its_mixers(teacher: Source, tmp_path: Path) -> None:
    mixers = ("lolcats", "softmax", "lawcat")
    directory = write_tiny_student(tmp_path / "s", teacher.directory, mixers)
    student = read_student(directory)
    config, weights = apply_student(teacher, student)
    assert config.mixers == mixers
    assert config.lolcats == student.manifest.lolcats
    Decoder.from_store(config, weights)(torch.arange(9)[None])


def test_differences_come_back_as_pairs(directory: Path) -> None:
    pairs = lowrank_pairs(read_student(directory))
    assert len(pairs) == 2 * 4
    assert pairs[f"{ATTENTION}.q_proj"].shape == (96, 64)
    stored = load_file(directory / "student.safetensors")
    again = lowrank_tensors(pairs)
    assert set(again) == {name for name in stored if "lowrank" in name}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.items())


def test_a_student_of_another_base(tiny_checkpoint: Tiny, directory: Path) -> None:
    other = open_source(tiny_checkpoint("qwen3", seed=1))
    student = read_student(directory)
    with pytest.raises(SourceError) as caught:
        apply_student(other, student)
    assert str(student.manifest.base["sha256"])[:12] in str(caught.value)
    assert other.identity["sha256"][:12] in str(caught.value)


# ---- damage, each to a copy of a sound student


def no_manifest(directory: Path) -> None:
    (directory / "student.json").unlink()


def no_tensors(directory: Path) -> None:
    (directory / "student.safetensors").unlink()


def cut_tensors(directory: Path) -> None:
    path = directory / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flipped_bit(directory: Path) -> None:
    path = directory / "student.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def cut_manifest(directory: Path) -> None:
    path = directory / "student.json"
    path.write_text(path.read_text()[:100])


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no-manifest": (no_manifest, r"not an edgekit student \(student.json is missing\)"),
    "no-tensors": (no_tensors, "student.safetensors: missing"),
    "cut-tensors": (cut_tensors, "student.safetensors: damaged"),
    "flipped-bit": (flipped_bit, "student.safetensors: damaged"),
    "cut-manifest": (cut_manifest, "student.json: not readable as JSON"),
    "version": (lambda d: edit(d, format_version=2), "student format 2, this edgekit reads 1"),
    "unknown-key": (lambda d: edit(d, colour=1), "unknown key 'colour'"),
    "no-files": (lambda d: edit(d, files={}), "student.safetensors: damaged"),
    "mixer": (lambda d: edit(d, mixers=["rnn"]), "mixer 'rnn' is unknown; known: "),
    "base": (lambda d: edit(d, base={"name": "x", "kind": "hub"}), "its base has no sha256"),
    "lolcats": (lambda d: edit(d, mixers=["lolcats"]), "lolcats layers and their options go"),
    "lawcat": (lambda d: edit(d, lawcat={"conv_size": 1}), "conv_size 1 given"),
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_a_damaged_or_foreign_directory(directory: Path, damage: str) -> None:
    act, said = UNREADABLE[damage]
    act(directory)
    with pytest.raises(SourceError, match=said) as caught:
        read_student(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_student(tmp_path: Path) -> None:
    for spec in ("", "no-such-student", tmp_path / "none"):
        with pytest.raises(SourceError, match=f"^{spec}: no such student; allowed: a directory"):
            read_student(spec)


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The same student with its tensors changed, checksums and all."""
    tensors = load_file(directory / "student.safetensors")
    manifest = read_student(directory).manifest
    change(tensors)
    write_student(directory, manifest, tensors)


A, B = f"{ATTENTION}.q_proj.lowrank_a", f"{ATTENTION}.q_proj.lowrank_b"
CONV = f"{ATTENTION}.conv_q.weight"
MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(CONV), f"has no tensor '{CONV}'"),
    "shape": (lambda t: t.update({CONV: torch.zeros(2, 2)}), r"is \[2, 2\], the model asks for"),
    "half": (lambda t: t.pop(B), "lacks its other half"),
    "ranks": (lambda t: t.update({B: torch.zeros(96, 3)}), "allowed: A"),
    "width": (lambda t: t.update({A: torch.zeros(2, 9)}), r"is for a weight \[96, 9\]"),
    "left-over": (lambda t: t.update({"model.x": torch.zeros(1)}), "'model.x' has no place"),
    "softmax": (
        lambda t: t.update({CONV.replace(".0.", ".1."): torch.zeros(1)}),
        "'model.layers.1.self_attn.conv_q.weight' has no place",
    ),
    "target": (
        lambda t: t.update({"model.y.lowrank_a": torch.zeros(1, 1)}),
        "'model.y.lowrank_a' has no place",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit(teacher: Source, directory: Path, misfit: str) -> None:
    change, said = MISFITS[misfit]
    rewritten(directory, change)
    with pytest.raises(SourceError, match=said) as caught:
        apply_student(teacher, read_student(directory))
    assert "student.safetensors: " in str(caught.value)


@pytest.mark.parametrize("name", [CONV, A])
def test_a_tensor_that_is_not_finite(teacher: Source, directory: Path, name: str) -> None:
    path = directory / "student.safetensors"
    tensors = load_file(path)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    record = {"size": path.stat().st_size, "sha256": sha256_of([path])}
    edit(directory, files={path.name: record})
    with pytest.raises(SourceError, match=f"{name.removesuffix('.lowrank_a')}.*not finite"):
        apply_student(teacher, read_student(directory))


def test_mixers_for_another_count_of_layers(teacher: Source, directory: Path) -> None:
    edit(directory, mixers=["lawcat", "softmax"])
    with pytest.raises(SourceError, match=r"has 2 mixers, .* has 3 layers"):
        apply_student(teacher, read_student(directory))


@pytest.mark.parametrize(
    ("value", "said"), [(torch.nan, "is not finite"), (1e6, "is too large for float16")]
)
def test_what_is_not_finite_is_not_written(
    teacher: Source, tmp_path: Path, value: float, said: str
) -> None:
    with pytest.raises(UsageError, match=f"'{CONV}': a value {said}"):
        write_student(tmp_path, manifest_of(teacher), {CONV: torch.tensor([1.0, value])})
    assert list(tmp_path.iterdir()) == []


def test_written_whole_and_replaced_only_by_force(teacher: Source, tmp_path: Path) -> None:
    out = tmp_path / "student"
    manifest = manifest_of(teacher)
    for force in (False, True):
        with staged(out, kind="student", force=force) as work:
            write_student(work, manifest, {})
    read_student(out)
    with pytest.raises(BundleError, match="exists already"), staged(out, kind="student"):
        pass
    with pytest.raises(BundleError, match="not an edgekit bundle"), staged(out, force=True):
        pass
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "edgekit.json").write_text("{}")
    with (
        pytest.raises(BundleError, match="not an edgekit student"),
        staged(foreign, force=True, kind="student"),
    ):
        pass


# ---- open_model


def test_open_model_of_a_teacher(teacher: Source) -> None:
    source, config, weights = open_model(teacher.directory)
    assert source.identity == teacher.identity
    assert config == teacher.config
    assert set(weights) == set(teacher.weights)
    with pytest.raises(UsageError, match="allowed: with a student only"):
        open_model(teacher.directory, base="x")


def test_open_model_of_a_student_asks_for_a_base_that_has_no_name(
    teacher: Source, directory: Path
) -> None:
    with pytest.raises(UsageError, match="give the model with --base"):
        open_model(directory)
    source, config, weights = open_model(directory, base=teacher.directory)
    assert source.identity == teacher.identity
    assert config.mixers == HYBRID
    assert CONV in weights


def test_open_model_finds_the_built_in_base(tmp_path: Path) -> None:
    directory = write_tiny_student(tmp_path / "s", "smollm2-135m-instruct", ("softmax",) * 30)
    source, config, _ = open_model(directory)
    assert source.name == "SmolLM2-135M-Instruct"
    assert config.num_layers == 30
