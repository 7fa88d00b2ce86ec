"""SPIN's sums of image keys as a state: in place, reordered, saved, on both engines."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle import Manifest, read_manifest
from edgekit.errors import BundleError
from edgekit.export.openvino_file import write_openvino
from edgekit.export.states import input_names, state_records
from edgekit.export.to_onnx import write_onnx
from edgekit.models.spin import SpinConfig
from edgekit.runtime.engine import EngineRequest, EngineSettings
from edgekit.runtime.ort import FreshRequest, InPlaceRequest, OnnxEngine
from edgekit.runtime.ov import OpenVinoEngine
from edgekit.runtime.state import Snapshot, load_snapshot, save_snapshot
from edgekit.sources import open_source

SPIN = SpinConfig(suppress=2, alpha=0.25, score="logit")
SETTINGS = EngineSettings(device="CPU", logits="last", threads=1, cache_dir=None, precision="f32")
ENGINES = {"openvino": OpenVinoEngine, "onnx": OnnxEngine}
FIRST, LENGTH, ROWS = 40, 60, 2


@pytest.fixture(scope="module")
def gated(
    tiny_checkpoint: Callable[..., Path],
    bundle: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Manifest]:
    """Graphs of both engines under the score `logit`, and their manifest."""
    source, out = open_source(tiny_checkpoint("llama")), tmp_path_factory.mktemp("gated")
    config = replace(source.config, spin=SPIN)
    write_openvino(config, source.weights, out, weights_format="fp32")
    write_onnx(config, source.weights, out)
    plain = read_manifest(bundle("softmax"))
    facts = replace(plain.model, inputs=input_names(config))
    return out, replace(plain, model=facts, states=state_records(config))


class Reader:
    """Two rows of tokens with an image in each, and one left-padded."""

    def __init__(self, inputs: frozenset[str]) -> None:
        random = np.random.default_rng(3)
        self._ids = random.integers(3, 320, (ROWS, LENGTH))
        self._image = np.zeros((ROWS, LENGTH), np.int64)
        self._image[0, 5:20] = self._image[1, 30:50] = 1
        self._mask = np.ones((ROWS, LENGTH), np.int64)
        self._mask[1, :9] = 0
        self._inputs = inputs

    def read(
        self, request: EngineRequest, start: int, end: int, rows: tuple[int, ...] = (0, 1)
    ) -> np.ndarray:
        """Logits after the columns from `start` to `end`."""
        order, part = list(rows), slice(start, end)
        mask = self._mask[order, :end]
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, part]
        feeds = {
            "input_ids": self._ids[order, part],
            "attention_mask": mask,
            "position_ids": positions,
            "spin_image_mask": self._image[order, part],
        }
        names = self._inputs
        return request.infer({n: np.ascontiguousarray(x) for n, x in feeds.items() if n in names})


def test_in_place_equals_fresh_tensors_bit_for_bit(gated: tuple[Path, Manifest]) -> None:
    engine = OnnxEngine(*gated, SETTINGS)
    results = []
    for kind in (InPlaceRequest, FreshRequest):
        reader, request, logits = Reader(engine.inputs), kind(engine, ROWS), []
        for start, end in ((0, FIRST), (FIRST, FIRST + 1), (FIRST + 1, FIRST + 2)):
            logits.append(reader.read(request, start, end))
        results.append((logits, request.read_states()))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert results[0][1].keys() >= {"0.spin", "2.spin"}
    for key, state in results[0][1].items():
        np.testing.assert_array_equal(state, results[1][1][key])


def test_rows_move_and_return(gated: tuple[Path, Manifest], engine: str) -> None:
    """A reorder takes the sums along, and what was read back continues bit for bit."""
    compiled = ENGINES[engine](*gated, SETTINGS)
    reader, request = Reader(compiled.inputs), compiled.request(ROWS)
    reader.read(request, 0, FIRST)
    kept = request.read_states()
    assert kept["1.spin"].shape == (ROWS, 2, 17)
    assert kept["1.spin"][:, 0, -1].tolist() == [15, 10]
    straight = reader.read(request, FIRST, LENGTH)
    request.write_states(kept)
    np.testing.assert_array_equal(reader.read(request, FIRST, LENGTH), straight)
    request.write_states(kept)
    request.reorder(np.array([1, 0, 1]))
    moved = reader.read(request, FIRST, LENGTH, (1, 0, 1))
    np.testing.assert_allclose(moved, straight[[1, 0, 1]], atol=1e-5)
    request.reset(ROWS)
    assert not any(state.any() for key, state in request.read_states().items() if "spin" in key)


def test_a_saved_state_has_the_sums(
    gated: tuple[Path, Manifest], engine: str, tmp_path: Path
) -> None:
    compiled, manifest = ENGINES[engine](*gated, SETTINGS), gated[1]
    reader, request = Reader(compiled.inputs), compiled.request(ROWS)
    reader.read(request, 0, FIRST)
    assert not manifest.constant_memory
    snapshot = Snapshot(
        fingerprint=manifest.fingerprint,
        engine=engine,
        position=FIRST,
        tokens=np.array([FIRST, FIRST - 9]),
        mask=np.ones((ROWS, FIRST), np.int64),
        states=request.read_states(),
        behind=np.zeros(ROWS, np.int64),
    )
    save_snapshot(snapshot, tmp_path / "state.safetensors")
    loaded = load_snapshot(tmp_path / "state.safetensors", manifest, engine)
    for key, state in snapshot.states.items():
        np.testing.assert_array_equal(loaded.states[key], state)
    narrow = {**snapshot.states, "0.spin": snapshot.states["0.spin"][..., :-1]}
    save_snapshot(replace(snapshot, states=narrow), tmp_path / "narrow.safetensors")
    with pytest.raises(BundleError, match=r"0\.spin is float32 \(2, 2, 16\), expected"):
        load_snapshot(tmp_path / "narrow.safetensors", manifest, engine)
