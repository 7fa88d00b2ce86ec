"""A graph of one token beside the bundle's own says what the bundle's own says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import targets
from edgekit.errors import UnsupportedError, UsageError
from edgekit.runtime import Model, load
from edgekit.runtime.ov_pairs import SteppedRequest
from edgekit.testing import TOLERANCE, assert_close

Bundles = Callable[[str], Path]
Loader = Callable[..., Model]
CLOSE = TOLERANCE["float32"]
FIXED = ["q_head", "kv_head", "lolcats"]
PROMPT = "The river had been rising since noon, and by the time the lamps were lit"


@pytest.fixture
def both(fresh: Loader) -> Callable[[str], tuple[Model, Model]]:
    """A model with a graph of a step, and one without."""
    return lambda layout: (
        fresh(layout, "openvino", graph="stepped"),
        fresh(layout, "openvino", graph="dynamic"),
    )


@pytest.mark.parametrize("layout", FIXED)
def test_steps_between_texts_of_any_length(layout: str, both: Callable[..., Any]) -> None:
    random = np.random.default_rng(0)
    stepped, dynamic = (model.session() for model in both(layout))
    for count in (1, 1, 70, 1, 1, 1, 5, 1):
        ids = random.integers(0, 300, count)
        assert_close("logits", dynamic.append(ids), stepped.append(ids), ratio=CLOSE)
        ours, theirs = (session.snapshot().states for session in (stepped, dynamic))
        for name, state in theirs.items():
            assert_close(name, state, ours[name], ratio=CLOSE)


@pytest.mark.parametrize("layout", FIXED)
def test_rows_come_and_go(layout: str, both: Callable[..., Any]) -> None:
    random = np.random.default_rng(1)
    sessions = [model.session() for model in both(layout)]

    def step(rows: int, count: int = 1) -> None:
        ids = random.integers(0, 300, (rows, count))
        ours, theirs = (session.append(ids) for session in sessions)
        assert_close("logits", theirs, ours, ratio=CLOSE)

    def reorder(*rows: int) -> None:
        for session in sessions:
            session.reorder(rows)

    step(1, 9)
    step(1)
    reorder(0)
    step(1)
    reorder(0, 0, 0)
    step(3)
    reorder(2, 0, 1)
    step(3)
    reorder(1)
    step(1)
    step(1)
    reorder(0, 0)
    step(2)
    for session in sessions:
        session.reset()
    step(2)


def test_a_snapshot_between_steps_is_bit_exact(fresh: Loader) -> None:
    session = fresh("kv_head", "openvino", graph="stepped").session()
    session.append(np.arange(3, 20))
    session.append(np.array([5]))
    kept = session.snapshot()
    first = [session.append(np.array([token])) for token in (7, 8)]
    session.append(np.arange(30))
    session.restore(kept)
    again = [session.append(np.array([token])) for token in (7, 8)]
    assert all(map(np.array_equal, first, again))


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same(beams: int, both: Callable[..., Any]) -> None:
    ours, theirs = (m.generate(PROMPT, max_new_tokens=24, num_beams=beams) for m in both("kv_head"))
    assert ours == theirs


def test_cpus_step_where_states_are_fixed(bundle: Bundles, kind: str) -> None:
    model = load(bundle(kind), engine="openvino")
    stepped = isinstance(model.session()._request, SteppedRequest)
    assert model.graph == ("stepped" if stepped else "dynamic")
    assert stepped == (kind in FIXED)
    assert not isinstance(
        load(bundle(kind), engine="openvino", logits="all").session()._request, SteppedRequest
    )


def test_what_cannot_step_is_refused_in_one_line(bundle: Bundles) -> None:
    with pytest.raises(UnsupportedError, match="has no fixed size; allowed: layers of lawcat"):
        load(bundle("hybrid"), engine="openvino", graph="stepped")
    with pytest.raises(UsageError, match=r"graph 'stepped' given on onnx; allowed: dynamic, .*"):
        load(bundle("kv_head"), engine="onnx", graph="stepped")
    with pytest.raises(UsageError, match="graph 'frozen' given on openvino; allowed: dynamic"):
        load(bundle("kv_head"), engine="openvino", graph="frozen")


def test_short_of_memory_there_is_one_graph(bundle: Bundles) -> None:
    model = load(bundle("kv_head"), engine="openvino")
    size = sum(model.manifest.files[f].size for f in model.manifest.engine_files("openvino"))
    target = replace(targets.load("generic-x86"), memory_budget=0.5)
    form = targets.fitting_graph
    assert form(target, model.manifest, 4 * size) == form(target, model.manifest, None) == "stepped"
    assert form(target, model.manifest, 4 * size - 1) == "dynamic"
