"""What a user of `edgekit convert` sees when something is wrong: one line, and nothing at OUT."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekit.bundle import MANIFEST
from edgekit.errors import BundleError, SourceError
from edgekit.export.pipeline import convert

QUICK = ("--weights", "fp32", "--no-verify", "--target", "generic-x86")
Edgekit = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


# ---- sources


def no_source(source: Path) -> None:
    shutil.rmtree(source)


def empty_source(source: Path) -> None:
    shutil.rmtree(source)
    source.mkdir()


def another_architecture(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["BertModel"]}
    (source / "config.json").write_text(json.dumps(config))


def cut_weights(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupted_header(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 500)


def missing_tensor(source: Path) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def pickle_for_safetensors(source: Path) -> None:
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()


def pickle_by_another_name(source: Path) -> None:
    torch.save({"a": torch.ones(1)}, source / "model.safetensors")


def no_tokenizer(source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()


def cut_tokenizer(source: Path) -> None:
    path = source / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:3000])


def foreign_vocabulary(source: Path) -> None:
    no_tokenizer(source)
    (source / "tokenizer.model").write_bytes(b"\x00\x01 no vocabulary at all")


SOURCES: dict[Callable[[Path], None], str] = {
    no_source: "no such source; allowed: a model directory",
    empty_source: "empty; a model directory has config.json",
    another_architecture: "model_type 'bert', architecture 'BertModel' given; supported: Llama",
    cut_weights: "model.safetensors: truncated, damaged or no safetensors file",
    corrupted_header: "model.safetensors: truncated, damaged or no safetensors file",
    missing_tensor: "no tensor 'model.layers.2.mlp.up_proj.weight'",
    pickle_for_safetensors: "pytorch_model.bin: a pickle can run code and is not opened",
    pickle_by_another_name: "model.safetensors: truncated, damaged or no safetensors file",
}
TOKENIZERS: dict[Callable[[Path], None], str] = {
    no_tokenizer: "has no tokenizer; add its tokenizer.json",
    cut_tokenizer: "tokenizer.json: damaged",
    foreign_vocabulary: "no usable tokenizer",
}


@pytest.mark.parametrize("damage", SOURCES)
def test_a_source_that_cannot_be_used(
    edgekit: Edgekit, source: Path, out: Path, damage: Callable[[Path], None]
) -> None:
    damage(source)
    done = edgekit("convert", source, "-o", out / "deep", *QUICK)
    assert (done.code, len(done.err)) == (1, 1)
    assert done.err[0].startswith("edgekit: error: ")
    assert str(source) in done.err[0] or "tensor" in done.err[0] or "'bert'" in done.err[0]
    assert SOURCES[damage] in done.err[0]
    assert os.listdir(out.parent) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_source_without_a_tokenizer_that_works(
    edgekit: Edgekit, source: Path, out: Path, damage: Callable[[Path], None]
) -> None:
    damage(source)
    done = edgekit("convert", source, "-o", out, *QUICK)
    assert done.code == 1
    steps, error = done.err[:-1], done.err[-1]
    assert len(steps) == 1  # nothing heavy was begun
    assert "tokenizer" in steps[0]
    assert str(source) in error
    assert TOKENIZERS[damage] in error
    assert os.listdir(out.parent) == []


def test_a_gguf_of_another_family(
    edgekit: Edgekit, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    done = edgekit("convert", path, "-o", out, *QUICK)
    assert (done.code, len(done.err)) == (1, 1)
    assert "architecture 'mamba' given; supported: Llama" in done.err[0]
    path.write_bytes(path.read_bytes()[:20])
    done = edgekit("convert", path, "-o", out, *QUICK)
    assert (done.code, len(done.err)) == (1, 1)
    assert f"{path}: truncated or damaged" in done.err[0]
    assert os.listdir(out.parent) == []


# ---- bundles, as `run` meets them


def another_version(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(data | {"format_version": 99}))


def traversal(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"]["../../etc/passwd"] = {"size": 1, "sha256": ""}
    (bundle / MANIFEST).write_text(json.dumps(data))


def flipped_weights(bundle: Path) -> None:
    path = bundle / "openvino_model.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def cut_model(bundle: Path) -> None:
    path = bundle / "openvino_model.bin"
    path.write_bytes(path.read_bytes()[:-1])


BUNDLES: dict[Callable[[Path], None], str] = {
    another_version: "bundle format 99, this edgekit reads 1",
    traversal: "'../../etc/passwd' leads outside the bundle; refused",
    flipped_weights: "openvino_model.bin: damaged (its sha256 differs",
    cut_model: "openvino_model.bin: damaged (",
}


@pytest.mark.parametrize("damage", BUNDLES)
def test_a_bundle_that_cannot_be_trusted(
    edgekit: Edgekit, whole: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    damage(copy)
    done = edgekit("run", copy, "-p", "hello", "-n", "1")
    assert (done.code, len(done.err)) == (1, 1)
    assert BUNDLES[damage] in done.err[0]


# ---- OUT


def test_an_existing_out_is_refused_at_once(
    edgekit: Edgekit, checkpoint: Path, whole: Path, out: Path, contents: Contents
) -> None:
    shutil.copytree(whole, out)
    before = contents(out)
    done = edgekit("convert", checkpoint, "-o", out, *QUICK)
    assert (done.code, len(done.err)) == (1, 1)
    assert f"{out}: exists already" in done.err[0]
    assert contents(out) == before
    assert os.listdir(out.parent) == ["out"]


def test_an_out_below_a_file(edgekit: Edgekit, checkpoint: Path, out: Path) -> None:
    out.write_text("a file")
    done = edgekit("convert", checkpoint, "-o", out / "a" / "b", *QUICK)
    assert (done.code, len(done.err)) == (1, 1)
    assert f"{out}/a/b: could not be written (a part of the path is no directory" in done.err[0]
    assert os.listdir(out.parent) == ["out"]


@pytest.fixture
def read_only(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if os.geteuid() == 0:  # permission bits do not bind root
        mounted: Path = request.getfixturevalue("mount")("ro")
        return mounted
    directory = tmp_path / "read-only"
    directory.mkdir(mode=0o555)
    return directory


@pytest.mark.parametrize("below", ["out", "a/b/out"])
def test_an_out_that_may_not_be_written(
    edgekit: Edgekit, checkpoint: Path, read_only: Path, below: str
) -> None:
    done = edgekit("convert", checkpoint, "-o", read_only / below, *QUICK)
    assert (done.code, len(done.err)) == (1, 1)
    assert "could not be written (" in done.err[0]
    assert "Read-only file system" in done.err[0] or "Permission denied" in done.err[0]
    assert os.listdir(read_only) == []


def test_a_mount_point_cannot_be_replaced(
    edgekit: Edgekit, checkpoint: Path, mount: Callable[[str], Path]
) -> None:
    directory = mount("size=16m")
    done = edgekit("convert", checkpoint, "-o", directory, *QUICK, "--force")
    assert (done.code, len(done.err)) == (1, 1)
    assert "is a mount point; choose the name of a directory in it" in done.err[0]
    assert edgekit("convert", checkpoint, "-o", directory / "out", *QUICK).code == 0


def test_api_errors_are_ours(source: Path, out: Path) -> None:
    no_tokenizer(source)
    with pytest.raises(SourceError, match="has no tokenizer"):
        convert(source, out, weights="fp32")
    file = out.parent / "file"
    file.touch()
    with pytest.raises(BundleError, match="a part of the path is no directory"):
        convert(source, file / "out", weights="fp32")
