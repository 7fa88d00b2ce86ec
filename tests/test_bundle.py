"""The manifest: what it keeps, and what of it is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    ModelFacts,
    StateRecord,
    check_files,
    describe_files,
    read_manifest,
    write_manifest,
)
from edgekit.errors import BundleError

Change = Callable[[dict[str, Any]], object]

FACTS = ModelFacts(
    family="llama",
    vocab_size=320,
    num_layers=1,
    context_length=None,
    bos_token_id=1,
    eos_token_ids=(2, 3),
    pad_token_id=None,
    inputs=("input_ids", "attention_mask"),
)
STATE = StateRecord(
    layer=0,
    kind="ssm",
    openvino="cache_params.past.ssm.0",
    onnx=("past_key_values.0.recurrent_state", "present.0.recurrent_state"),
    shape=(-1, 4, 16, 24),
)


def fill(directory: Path, content: str = "weights") -> Manifest:
    """A bundle of two files whose contents say `content`; returns its manifest."""
    (directory / "part").mkdir(parents=True)
    (directory / "model.onnx").write_text(content * 100)
    (directory / "part" / "extra.bin").write_text(content)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source={"kind": "hf-directory", "name": "tiny"},
        model=FACTS,
        mixers=("lawcat",),
        states=(STATE,),
        weights="int4",
        engines=("onnx",),
        target="generic-x86",
        pipeline=({"step": "load", "notes": []},),
        versions={"edgekit": "0"},
        files=describe_files(directory),
        verification={"onnx": {"kl": 0.1}},
    )
    write_manifest(directory, manifest)
    return manifest


def test_a_manifest_reads_back_equal(tmp_path: Path) -> None:
    manifest = fill(tmp_path / "b")
    assert read_manifest(tmp_path / "b") == manifest
    assert set(manifest.files) == {"model.onnx", "part/extra.bin"}
    assert manifest.constant_memory
    check_files(tmp_path / "b", manifest)


@pytest.mark.parametrize("kind", ["conv", "ssm", "spin", "key", "value"])
def test_memory_is_constant_where_no_state_grows(kind: Any, tmp_path: Path) -> None:
    manifest = fill(tmp_path / "b")
    states = (STATE, replace(STATE, kind=kind))
    assert replace(manifest, states=states).constant_memory is (kind not in ("key", "value"))


def test_fingerprint_follows_the_files_only(tmp_path: Path) -> None:
    first, same, other = (
        fill(tmp_path / name, text) for name, text in (("a", "x"), ("b", "x"), ("c", "y"))
    )
    assert first.fingerprint == same.fingerprint != other.fingerprint


def rewrite(directory: Path, change: Change) -> None:
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def names(name: str) -> Change:
    """A change that lists a file called `name`."""
    return lambda m: m["files"].update({name: {"size": 1, "sha256": "0"}})


REFUSED: dict[str, tuple[Change, str]] = {
    "parent": (names("../secret"), r"'\.\./secret' leads outside the bundle; refused"),
    "parent-within": (names("part/../../secret"), "leads outside the bundle"),
    "absolute": (names("/etc/passwd"), "'/etc/passwd' leads outside the bundle"),
    "backslash": (names("..\\secret"), "leads outside the bundle"),
    "empty": (names(""), "leads outside the bundle"),
    "itself": (names("."), "leads outside the bundle"),
    "nul": (names("a\0b"), "leads outside the bundle"),
    "version": (lambda m: m.update(format_version=2), "bundle format 2, this edgekit reads 1"),
    "no-version": (lambda m: m.pop("format_version"), "bundle format None"),
    "boolean": (lambda m: m.update(format_version=True), "expected int, got True"),
    "unknown": (lambda m: m.update(extra=1), "unknown key 'extra'; known: "),
    "unknown-within": (lambda m: m["model"].update(extra=1), "model: unknown key 'extra'"),
    "missing": (lambda m: m.pop("states"), "the key 'states' is missing"),
    "text-for-list": (lambda m: m.update(mixers="lawcat"), "mixers: expected a list"),
    "list-for-table": (lambda m: m.update(files=[["a", "b"]]), "files: expected a table"),
    "number-for-table": (lambda m: m["files"].update({"a": 3}), "a: expected a table, got 3"),
    "text-for-size": (
        lambda m: m["files"]["model.onnx"].update(size="700"),
        "model.onnx: size: expected int, got '700'",
    ),
    "float-for-int": (lambda m: m["model"].update(vocab_size=3.5), "expected int, got 3.5"),
    "state-kind": (lambda m: m["states"][0].update(kind="rnn"), "'rnn' given; allowed: conv"),
    "state-names": (lambda m: m["states"][0].update(onnx=["a"]), "expected 2 items, got 1"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_changed_manifest_is_refused(tmp_path: Path, change: Change, says: str) -> None:
    fill(tmp_path / "b")
    rewrite(tmp_path / "b", change)
    with pytest.raises(BundleError, match=says) as caught:
        read_manifest(tmp_path / "b")
    assert MANIFEST in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe{}", b"[" * 100_000],
    ids=["empty", "cut", "not-utf8", "deep"],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    fill(tmp_path / "b")
    (tmp_path / "b" / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=r"edgekit\.json: damaged .*; convert the model again"):
        read_manifest(tmp_path / "b")


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null"])
def test_a_manifest_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    fill(tmp_path / "b")
    (tmp_path / "b" / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="bundle format None"):
        read_manifest(tmp_path / "b")


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle directory"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"not an edgekit bundle \(edgekit\.json is missing\)"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("to", ["../secret", "/etc/hostname", "model.onnx"])
def test_links_may_not_lead_outside(tmp_path: Path, to: str) -> None:
    directory = tmp_path / "b"
    fill(directory)
    (tmp_path / "secret").write_text("x")
    (directory / "part" / "extra.bin").unlink()
    (directory / "part" / "extra.bin").symlink_to(
        f"../{to}" if to == "model.onnx" else tmp_path / "b" / to
    )
    if to == "model.onnx":
        read_manifest(directory)
        return
    with pytest.raises(BundleError, match="a link that leads outside the bundle; refused"):
        read_manifest(directory)


def test_a_link_that_leads_nowhere_is_missing(tmp_path: Path) -> None:
    manifest = fill(tmp_path / "b")
    (tmp_path / "b" / "model.onnx").unlink()
    (tmp_path / "b" / "model.onnx").symlink_to("model.onnx")
    assert read_manifest(tmp_path / "b") == manifest
    with pytest.raises(BundleError, match=r"model\.onnx: missing"):
        check_files(tmp_path / "b", manifest)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_flip, r"damaged \(its sha256 differs"),
        (damage_cut, r"damaged \(\d+ bytes, \d+ expected\)"),
        (Path.unlink, "missing"),
        (damage_into_directory, "missing"),
    ],
    ids=["flipped", "cut", "deleted", "directory"],
)
@pytest.mark.parametrize("name", ["model.onnx", "part/extra.bin"])
def test_a_damaged_file_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], says: str
) -> None:
    manifest = fill(tmp_path / "b")
    damage(tmp_path / "b" / name)
    with pytest.raises(BundleError, match=f"{name}: {says}"):
        check_files(tmp_path / "b", manifest)
    others = (other for other in manifest.files if other != name)
    check_files(tmp_path / "b", manifest, others)


def test_files_that_are_not_listed_are_no_part(tmp_path: Path) -> None:
    manifest = fill(tmp_path / "b")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    check_files(tmp_path / "b", manifest)
    with pytest.raises(BundleError, match=r"notes\.txt is not part of this bundle"):
        check_files(tmp_path / "b", manifest, iter(["notes.txt"]))
