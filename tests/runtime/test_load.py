"""Opening bundles: which engine, which device, what is refused, and that no torch is needed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit import targets
from edgekit.bundle import ENGINE_FILES
from edgekit.errors import BundleError, EngineError, UsageError
from edgekit.runtime import Model, load

Bundle = Callable[[str], Path]
Loader = Callable[..., Model]

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnx", "nncf", "optimum", *sys.argv[3:]):
    sys.modules[name] = None
import edgekit.runtime
early = [name for name in ("openvino", "onnxruntime") if sys.modules.get(name)]
assert not early, f"imported too early: {early}"
model = edgekit.runtime.load(sys.argv[1], engine=sys.argv[2])
print(len(model.generate("The capital", max_new_tokens=4)) > 0)
prompt = model.chat_prompt([{"role": "user", "content": "Hi"}])
print(model.session().append(model.tokenizer.encode(prompt)).shape)
"""


@pytest.mark.parametrize(("name", "other"), [("openvino", "onnxruntime"), ("onnx", "openvino")])
def test_runs_without_torch_and_without_the_other_engine(
    bundle: Bundle, tmp_path: Path, name: str, other: str
) -> None:
    command = [sys.executable, "-P", "-W", "error", "-c", WITHOUT_TORCH]
    done = subprocess.run(
        [*command, str(bundle("hybrid")), name, other],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.split("\n")[:2] == ["True", "(1, 320)"]


def test_facts_of_a_model(opened: Loader, bundle: Bundle, engine: str) -> None:
    model = opened("hybrid", engine)
    assert (model.engine, model.device) == (engine, "CPU")
    assert model.manifest.mixers == ("lawcat", "softmax", "lawcat")
    assert 0 < model.compile_seconds < model.load_seconds
    files = [bundle("hybrid") / name for name in ENGINE_FILES[engine]]
    assert model.model_bytes == sum(path.stat().st_size for path in files if path.is_file())
    assert model.tokenizer.vocab_size == 320


@pytest.mark.parametrize(
    ("engines", "chosen"),
    [(["onnx", "openvino"], "openvino"), (["onnx"], "onnx")],
    ids=["both", "only-the-other"],
)
def test_the_engine_of_the_target_is_the_default(
    copy: Path, engines: list[str], chosen: str
) -> None:
    rewrite_manifest(copy, engines=engines)
    assert load(copy).engine == chosen


def test_the_device_of_the_target_is_the_default(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = (targets.FOLDER / "generic-x86.toml").read_text()
    (tmp_path / "tpu.toml").write_text(profile.replace('device = "CPU"', 'device = "TPU"'))
    monkeypatch.setattr(targets, "FOLDER", tmp_path)
    rewrite_manifest(copy, target="tpu")
    with pytest.raises(EngineError, match="device 'TPU'"):
        load(copy)
    assert load(copy, device="CPU").device == "CPU"
    assert load(copy, engine="onnx").device == "CPU"


def test_an_engine_that_is_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundle("q_head")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r'pip install "edgekit-lm\[openvino\]"'):
        load(made, engine="openvino")
    assert load(made).engine == "onnx"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="needs openvino or onnxruntime"):
        load(made)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"engine": "tensorrt"}, UsageError, "known: openvino, onnx"),
        ({"engine": "openvino", "device": "TPU"}, EngineError, "OpenVINO finds: .*CPU"),
        ({"engine": "openvino", "device": "cpu"}, EngineError, "OpenVINO finds: .*CPU"),
        ({"engine": "onnx", "device": "GPU"}, EngineError, "runs on: CPU"),
        ({"logits": "some"}, UsageError, "last, all"),
        ({"threads": 0}, UsageError, "1 or more"),
    ],
    ids=str,
)
def test_wrong_arguments(
    bundle: Bundle, settings: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        load(bundle("q_head"), **settings)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(
    bundle: Bundle, opened: Loader, engine: str, ids: np.ndarray, threads: int
) -> None:
    model = load(bundle("hybrid"), engine=engine, threads=threads)
    want = opened("hybrid", engine).session().append(ids)
    np.testing.assert_allclose(model.session().append(ids), want, atol=1e-4)


def test_compiled_blobs_are_kept(bundle: Bundle, opened: Loader, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = load(bundle("hybrid"), engine="openvino", cache_dir=folder)
    assert any(folder.iterdir())
    second = load(bundle("hybrid"), engine="openvino", cache_dir=folder)
    want = opened("hybrid", "openvino").generate("The", max_new_tokens=8)
    assert first.generate("The", max_new_tokens=8) == want
    assert second.generate("The", max_new_tokens=8) == want


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle("hybrid"), tmp_path / "copy"))


def rewrite_manifest(directory: Path, **changes: object) -> None:
    path = directory / "edgekit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("openvino_model.bin", "openvino"),
        ("openvino_model.xml", "openvino"),
        ("model.onnx", "onnx"),
        ("tokenizer.json", "onnx"),
    ],
)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_named(copy: Path, name: str, on: str, damage: str) -> None:
    data = bytearray((copy / name).read_bytes())
    (copy / name).unlink()
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    if damage != "missing":
        (copy / name).write_bytes(data[: -1 if damage == "truncated" else None])
    with pytest.raises(BundleError, match=f"{name}: (damaged|missing)"):
        load(copy, engine=on)


def test_without_the_check_the_engine_speaks(copy: Path, engine: str) -> None:
    (copy / ENGINE_FILES[engine][0]).write_bytes(b"not a model")
    with pytest.raises(BundleError, match="cannot be read"):
        load(copy, engine=engine, check=False)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        load(tmp_path / "absent")
    with pytest.raises(BundleError, match="not an edgekit bundle"):
        load(tmp_path)


def test_an_engine_that_the_bundle_lacks(copy: Path) -> None:
    rewrite_manifest(copy, engines=["openvino"])
    with pytest.raises(EngineError, match="convert again with --format onnx"):
        load(copy, engine="onnx")


def test_a_state_of_another_type_is_refused(copy: Path) -> None:
    states = json.loads((copy / "edgekit.json").read_text())["states"]
    states[0]["dtype"] = "float16"
    rewrite_manifest(copy, states=states)
    with pytest.raises(BundleError, match="dtype"):
        load(copy)
