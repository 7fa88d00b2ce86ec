"""Verification lets a right bundle through and stops a wrong one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from edgekit.bundle import MANIFEST, check_files, describe_files, read_manifest
from edgekit.config import dump
from edgekit.errors import SourceError, VerificationError
from edgekit.export.pipeline import convert
from edgekit.export.verify import (
    Bounds,
    Verification,
    bounds_for,
    verification_tokens,
    verify_engine,
)
from edgekit.runtime import load
from edgekit.sources import Source, open_source

Tiny = Callable[..., Path]
ENGINES = ("openvino", "onnx")
TENSOR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Tiny) -> Source:
    return open_source(tiny_checkpoint("qwen3", tie_word_embeddings=False))


@pytest.fixture(scope="module")
def whole(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "whole"
    convert(source.directory, out, weights="fp32", verify=False, target="generic-x86")
    return out


@pytest.fixture(scope="module")
def ids(whole: Path) -> np.ndarray:
    return verification_tokens(encoder(whole), 160)


def encoder(bundle: Path) -> Callable[[str], list[int]]:
    tokenizer = load(bundle, engine="onnx").tokenizer
    return lambda text: tokenizer.encode(text).tolist()


def place_of_weights(bundle: Path, source: Source, engine: str) -> tuple[Path, int, int]:
    """The file, offset and size in bytes of `TENSOR`, found by its contents."""
    name = {"openvino": "openvino_model.bin", "onnx": "model.onnx.data"}[engine]
    wanted = source.weights.tensor(TENSOR).numpy()
    data = (bundle / name).read_bytes()
    for candidate in (wanted.tobytes(), np.ascontiguousarray(wanted.T).tobytes()):
        if candidate in data:
            return bundle / name, data.index(candidate), len(candidate)
    pytest.fail(f"{TENSOR} is not in {name}")


@pytest.fixture
def overwrite(whole: Path, source: Source, tmp_path: Path) -> Callable[[str, float], Path]:
    """`overwrite("onnx", value)`: a copy with one MLP weight overwritten and new checksums."""

    def write(engine: str, value: float) -> Path:
        copy = Path(shutil.copytree(whole, tmp_path / "copy"))
        path, offset, size = place_of_weights(copy, source, engine)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(np.full(size // 4, value, np.float32).tobytes())
        data = json.loads((copy / MANIFEST).read_text())
        data["files"] = dump(describe_files(copy))
        (copy / MANIFEST).write_text(json.dumps(data))
        check_files(copy, read_manifest(copy))
        return copy

    return write


Overwrite = Callable[[str, float], Path]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_right_bundle(whole: Path, source: Source, ids: np.ndarray, engine: str) -> None:
    found = verify_engine(
        whole, engine, ids, source.config, source.weights, bounds_for("fp32", trained=True)
    )
    assert (found.engine, found.prompt_tokens, found.decode_steps) == (engine, len(ids), 32)
    assert 0 < found.mean_abs < found.max_abs < 1e-4
    assert abs(found.kl) < 1e-7
    assert (found.argmax_agreement, found.greedy_equal) == (1.0, 32)


def verify(bundle: Path, source: Source, engine: str, ids: np.ndarray, **bounds: float) -> object:
    return verify_engine(bundle, engine, ids, source.config, source.weights, Bounds(**bounds))


@pytest.mark.parametrize("bounds", [{"max_abs": 1e-3}, {"kl": 1e-3}], ids=["max_abs", "kl"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_damaged_weight(
    overwrite: Overwrite, source: Source, ids: np.ndarray, engine: str, bounds: dict[str, float]
) -> None:
    bundle = overwrite(engine, 0.0)
    (name,) = bounds
    with pytest.raises(VerificationError, match=f"{engine}: {name} .* exceeds .*--no-verify"):
        verify(bundle, source, engine, ids, **bounds)
    other = ENGINES[1 - ENGINES.index(engine)]
    assert verify(bundle, source, other, ids, **bounds)


def test_without_bounds_the_difference_is_told(
    overwrite: Overwrite, source: Source, ids: np.ndarray
) -> None:
    found = verify(overwrite("onnx", 0.0), source, "onnx", ids)
    assert isinstance(found, Verification)
    assert found.max_abs > 0.1
    assert found.kl > 1e-3
    assert found.argmax_agreement < 1


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_logits_that_are_not_finite(
    overwrite: Overwrite, source: Source, ids: np.ndarray, engine: str, value: float
) -> None:
    bundle = overwrite(engine, value)
    with pytest.raises(VerificationError, match="not finite"):
        verify(bundle, source, engine, ids)


def test_logits_that_are_finite_only_at_first(
    source: Source, ids: np.ndarray, tmp_path: Path
) -> None:
    """NaN in the embedding of a token that comes late: the first positions are right."""
    late = next(token for token in ids[100:] if token not in ids[:100])
    poisoned = Path(shutil.copytree(source.directory, tmp_path / "poisoned"))
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.embed_tokens.weight"][int(late)] = np.nan
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "here" / "out"
    with pytest.raises(VerificationError, match="not finite"):
        convert(poisoned, out, weights="fp32", formats=["onnx"], target="generic-x86")
    assert not out.parent.exists()


@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_a_conversion_that_fails_leaves_nothing(
    source: Source, whole: Path, tmp_path: Path, force: bool
) -> None:
    """Sharp logits, which four bits cannot hold."""
    sharp = Path(shutil.copytree(source.directory, tmp_path / "sharp"))
    tensors = load_file(sharp / "model.safetensors")
    tensors["model.norm.weight"] *= 30
    save_file(tensors, sharp / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "here" / "out"
    if force:
        shutil.copytree(whole, out)
    with pytest.raises(VerificationError, match=r"onnx: kl .* exceeds 5\.0e-01; try a wider"):
        convert(sharp, out, weights="int4", formats=["onnx"], target="generic-x86", force=force)
    assert out.parent.exists() == force
    if force:
        assert os.listdir(out.parent) == ["out"]
        check_files(out, read_manifest(out))
    report = convert(
        sharp, out, weights="int4", formats=["onnx"], target="generic-x86", force=force,
        verify=False,
    )  # fmt: skip
    assert report.verification == {}
    assert onnx.load(out / "model.onnx", load_external_data=False).graph.name == "decoder"


def test_tokens_leave_room_for_the_continuation(whole: Path) -> None:
    encode = encoder(whole)
    unlimited = verification_tokens(encode, None)
    assert (len(unlimited), unlimited.dtype) == (512, np.int64)
    assert len(verification_tokens(encode, 4096)) == 512
    for limit in (34, 100, 512):
        assert verification_tokens(encode, limit).tolist() == unlimited[: limit - 33].tolist()
    with pytest.raises(SourceError, match=r"of 33 tokens is too short .*--no-verify"):
        verification_tokens(encode, 33)
    assert verification_tokens(lambda text: [5, 6, 7], 38).tolist() == [5, 6, 7, 5, 6]
