"""A LoLCATs bundle as a whole: converted, verified, streamed, of constant size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.export.pipeline import convert
from edgekit.runtime import load

ENGINES = ("openvino", "onnx")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lolcats") / "bundle"
    report = convert(
        tiny_checkpoint("qwen3"), out, mixer="lolcats", weights="fp32", target="generic-x86"
    )
    assert set(report.verification) == set(ENGINES)
    for result in report.verification.values():
        assert result.greedy_equal == result.decode_steps
    return out


@pytest.mark.parametrize("engine", ENGINES)
def test_pieces_equal_one_pass_and_memory_is_constant(bundle: Path, engine: str) -> None:
    ids = np.arange(5, 305) % 300
    model = load(bundle, engine=engine)
    whole, pieces = model.session(), model.session()
    expected = whole.append(ids)
    first = pieces.append(ids[:1])
    size = pieces.state_bytes
    for start, end in ((1, 3), (3, 130), (130, 299), (299, 300)):
        first = pieces.append(ids[start:end])
    assert np.abs(first - expected).max() <= 1e-4
    assert pieces.state_bytes == whole.state_bytes == size
    assert pieces.room is None


@pytest.mark.parametrize("engine", ENGINES)
def test_snapshots_reorder_and_left_padding(bundle: Path, engine: str) -> None:
    model = load(bundle, engine=engine)
    rows = np.stack([np.arange(90) % 300, np.arange(7, 97) % 300])
    mask = np.ones_like(rows)
    mask[1, :80] = 0
    both = model.session(batch=2)
    logits = both.append(rows, mask)
    alone = model.session().append(rows[1, 80:])
    assert np.abs(logits[1] - alone[0]).max() <= 1e-4
    kept = both.snapshot()
    following = both.append(np.array([[4], [4]]))
    both.restore(kept)
    both.reorder([1, 0])
    assert np.abs(both.append(np.array([[4], [4]])) - following[::-1]).max() <= 1e-4
