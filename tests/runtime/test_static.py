"""A session on graphs of fixed shapes says what the dynamic graph says; on OpenVINO's CPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekit import targets
from edgekit.errors import UnsupportedError, UsageError
from edgekit.runtime import Model, load, loading
from edgekit.runtime.ov_shapes import CHUNK

Bundles = Callable[[str], Path]
MAX_ABS = 1e-4
RECURRENT = ["q_head", "kv_head"]


@pytest.fixture
def static(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Model]:
    """A model loaded as for an NPU, but for the device."""
    npu = replace(targets.load("intel-npu"), device="CPU", inference_precision="f32")
    monkeypatch.setattr(loading.targets, "load", lambda name: npu)
    return lambda kind: load(bundle(kind), engine="openvino")


@pytest.mark.parametrize("recurrent", RECURRENT)
@pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 7, 3 * CHUNK + 1])
def test_prompts_and_what_follows(
    recurrent: str, length: int, bundle: Bundles, static: Callable[[str], Model]
) -> None:
    random = np.random.default_rng(0)
    expected = load(bundle(recurrent), engine="openvino", device="CPU")
    fixed = static(recurrent)
    assert len(fixed._compiled._decoders) == 2
    ours, theirs = fixed.session(), expected.session()
    for count in (length, 1, 1, CHUNK + 3, 1):
        ids = random.integers(0, 300, count)
        assert np.abs(ours.append(ids) - theirs.append(ids)).max() <= MAX_ABS
    kept, more = ours.snapshot(), random.integers(0, 300, CHUNK + 2)
    first = ours.append(more)
    ours.restore(kept)
    assert np.array_equal(ours.append(more), first)
    assert np.abs(first - theirs.append(more)).max() <= MAX_ABS


def test_generation_is_the_same(bundle: Bundles, static: Callable[[str], Model]) -> None:
    prompt = "The river had been rising since noon, and by the time the lamps were lit " * 3
    expected = load(bundle("kv_head"), engine="openvino").generate(prompt, max_new_tokens=12)
    assert static("kv_head").generate(prompt, max_new_tokens=12) == expected


def test_more_than_one_row_and_growing_states_are_refused(
    bundle: Bundles, static: Callable[[str], Model]
) -> None:
    with pytest.raises(UnsupportedError, match="batch 2 asked for"):
        static("kv_head").session(2)
    with pytest.raises(UsageError, match="caches of 3 softmax layers grow"):
        static("softmax")
