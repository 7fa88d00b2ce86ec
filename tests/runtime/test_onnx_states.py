"""How the ONNX engine carries states: in place with contrib operators, fresh tensors without."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekit.export.pipeline import convert
from edgekit.export.to_onnx import write_onnx
from edgekit.runtime import Model, Session, load
from edgekit.runtime.engine import EngineSettings
from edgekit.runtime.ort import FreshRequest, InPlaceRequest, OnnxEngine
from edgekit.sources import open_source
from edgekit.testing import TOLERANCE, assert_close

Loader = Callable[..., Model]
Reference = Callable[[str], Callable[..., np.ndarray]]
FP32 = TOLERANCE["float32"]


@pytest.fixture(scope="module")
def portable(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Model:
    """The hybrid model as a graph of standard operators."""
    out = tmp_path_factory.mktemp("portable") / "bundle"
    convert(
        tiny_checkpoint("llama"),
        out,
        mixer="lawcat",
        softmax_layers=(1,),
        weights="fp32",
        formats=("onnx",),
        onnx_ops="portable",
        target="generic-x86",
        verify=False,
    )
    return load(out)


def run(session: Session, ids: np.ndarray) -> list[np.ndarray]:
    """Logits of blocks, steps, a reorder and a restored snapshot, two rows."""
    rows = np.stack((ids[:70], ids[70:140]))
    mask = np.ones_like(rows)
    mask[0, :4] = 0
    logits = [session.append(rows[:, :40], mask[:, :40]), session.append(rows[:, 40:])]
    logits += [session.append([[5], [6]])]
    here = session.snapshot()
    session.reorder([1, 0, 1])
    logits += [session.append([[7, 1], [8, 2], [9, 3]])]
    session.reorder([0, 1])
    session.restore(here)
    return [*logits, session.append([[4], [4]])]


def test_portable_graph_gets_fresh_tensors(
    portable: Model, reference: Reference, ids: np.ndarray
) -> None:
    assert isinstance(portable.session()._request, FreshRequest)
    got = run(portable.session(batch=2), ids)
    want = reference("hybrid")(np.append(ids[70:140], [6, 4])[None])[0]
    for step, at in enumerate((39, 69, 70)):
        assert_close(f"step {step}", want[at], got[step][1], ratio=FP32)
    assert_close("after the snapshot", want[71], got[4][1], ratio=FP32)


def test_both_graphs_agree(opened: Loader, portable: Model, ids: np.ndarray) -> None:
    contrib = opened("hybrid", "onnx")
    assert isinstance(contrib.session()._request, InPlaceRequest)
    pairs = zip(run(contrib.session(2), ids), run(portable.session(2), ids), strict=True)
    for step, (one, other) in enumerate(pairs):
        assert_close(f"step {step}", other, one, ratio=FP32)


@pytest.mark.parametrize("kept", ["softmax", "q_head", "kv_head", "hybrid"])
def test_in_place_equals_fresh_tensors_bit_for_bit(
    opened: Loader, ids: np.ndarray, kept: str
) -> None:
    engine = opened(kept, "onnx")._compiled
    assert isinstance(engine, OnnxEngine)
    records = opened(kept, "onnx").manifest.states
    results = []
    for request in (InPlaceRequest(engine, 1), FreshRequest(engine, 1)):
        logits, position = [], 0
        for length in (40, 1, 1, 100):
            position += length
            feeds = {
                "input_ids": ids[None, position - length : position],
                "attention_mask": np.ones((1, position), np.int64),
                "position_ids": np.arange(position - length, position)[None],
            }
            feeds = {name: array for name, array in feeds.items() if name in engine.inputs}
            logits.append(request.infer(feeds))
        results.append((logits, request.read_states()))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(results[0][1]) == len(records)
    for key, state in results[0][1].items():
        np.testing.assert_array_equal(state, results[1][1][key])


def test_attention_within_images_gets_fresh_tensors(
    opened: Loader, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its cache is a concatenation, though the bundle's operators are contrib ones."""
    source = open_source(tiny_checkpoint("llama"))
    write_onnx(replace(source.config, image_attention="bidirectional"), source.weights, tmp_path)
    settings = EngineSettings(
        device="CPU", logits="last", threads=1, cache_dir=None, precision="f32"
    )
    engine = OnnxEngine(tmp_path, opened("softmax", "onnx").manifest, settings)
    assert isinstance(engine.request(1), FreshRequest)


def test_buffers_double_and_keep_what_they_held(opened: Loader) -> None:
    session = opened("softmax", "onnx").session()
    request = session._request
    assert isinstance(request, InPlaceRequest)
    session.append(np.full(10, 9))
    first = next(iter(request._buffers.values()))
    session.append(np.full(200, 9))
    assert next(iter(request._buffers.values())) is first, "there was room"
    before = session.snapshot()
    session.append(np.full(200, 9))
    grown = next(iter(request._buffers.values()))
    assert grown.shape[2] == 2 * 410
    session.restore(before)
    assert next(iter(request._buffers.values())) is grown, "a restored state takes no new buffer"
    for key, state in session.snapshot().states.items():
        np.testing.assert_array_equal(state, before.states[key])
