"""Adapters at run time on both engines: the base at rank 0, the merged model otherwise."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.models.config import LawcatConfig
from edgekit.models.decoder import Decoder, with_fresh_mixers
from edgekit.runtime import Model, Session
from edgekit.sources import open_source
from edgekit.sources.adapted import adapted
from edgekit.sources.adapters import AdapterChoice
from edgekit.testing import assert_close

Checkpoint = Callable[..., Path]
Maker = Callable[..., Path]
Loader = Callable[..., Model]

LAYOUTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "q_head": {"mixer": "lawcat"},
    "kv_head": {"mixer": "lawcat", "state_sharing": "kv_head"},
    "hybrid": {"mixer": "lawcat", "softmax_layers": (1,)},
    "lolcats": {"mixer": "lolcats"},
}
ROUNDED = {
    "softmax": "int8",
    "q_head": "int8",
    "kv_head": "int4",
    "hybrid": "int4",
    "lolcats": "int4",
}
BLOCKS = (70, 1, 1, 18)
MAX_ABS = 1e-4
SAME = 1e-6  # relative, of the same numbers in another order


@pytest.fixture(scope="module")
def merged(tiny_checkpoint: Checkpoint) -> Callable[..., np.ndarray]:
    """`merged("hybrid", ids, {directory: weight})` are torch's logits `[B, T, V]`."""

    def run(
        layout: str, ids: np.ndarray, adapters: dict[Path, float], family: str = "llama"
    ) -> np.ndarray:
        source, settings = open_source(tiny_checkpoint(family)), LAYOUTS[layout]
        choices = [AdapterChoice(path=path, weight=weight) for path, weight in adapters.items()]
        tensors = adapted(source, choices)[1] if choices else source.weights
        kept, mixer = settings.get("softmax_layers", ()), settings.get("mixer", "softmax")
        mixers = tuple("softmax" if i in kept else mixer for i in range(3))
        lawcat = LawcatConfig(state_sharing=settings.get("state_sharing", "q_head"))
        config = source.config.with_mixers(mixers, lawcat)
        decoder = Decoder.from_store(config, with_fresh_mixers(config, tensors))
        with torch.inference_mode():
            return decoder(torch.from_numpy(ids))[0].numpy()

    return run


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(7).integers(3, 320, sum(BLOCKS))


def said(session: Session, ids: np.ndarray) -> np.ndarray:
    """Logits after each of `BLOCKS`."""
    ends = np.cumsum(BLOCKS)
    return np.concatenate([session.append(ids[e - n : e]) for n, e in zip(BLOCKS, ends)])  # noqa: B905


ENDS = np.cumsum(BLOCKS) - 1


@pytest.mark.parametrize(
    ("layout", "weights"), [*((layout, "fp32") for layout in LAYOUTS), *ROUNDED.items()]
)
def test_without_an_adapter_a_slot_changes_nothing(
    layout: str, weights: str, engine: str, fresh: Loader, adapter: Maker, ids: np.ndarray
) -> None:
    # Slots keep shapes open, and only equal shapes round alike.
    graph = "dynamic" if engine == "openvino" else None
    plain = fresh(layout, engine, weights=weights, graph=graph)
    model = fresh(layout, engine, weights=weights, adapter_slots="all")
    want = said(plain.session(), ids)
    same = np.testing.assert_array_equal
    if weights != "fp32":
        same = lambda x, y: assert_close("logits", x, y, ratio=SAME)  # noqa: E731
    same(want, said(model.session(), ids))
    model.set_adapters({model.load_adapter(adapter("lora")): 1.0})
    assert np.abs(said(model.session(), ids) - want).max() > 1
    for nothing in ({"lora": 0.0}, {}):
        model.set_adapters(nothing)
        assert model.active_adapters == {}
        same(want, said(model.session(), ids))


@pytest.mark.parametrize(
    ("layout", "family"),
    [*((layout, "llama") for layout in LAYOUTS), ("softmax", "qwen2"), ("kv_head", "qwen3")],
)
def test_an_adapter_is_the_merged_model(
    layout: str,
    family: str,
    engine: str,
    fresh: Loader,
    adapter: Maker,
    merged: Callable[..., np.ndarray],
    ids: np.ndarray,
) -> None:
    path = adapter("lora", family)
    model = fresh(layout, engine, family=family, logits="all", adapter_slots="all")
    assert model.load_adapter(path) == "lora"
    model.set_adapters({"lora": 1.0})
    session, want = model.session(), merged(layout, ids[None], {path: 1.0}, family)
    for start, end in ((0, 70), (70, 71), (71, 72), (72, 90)):
        got = session.append(ids[start:end])
        assert np.abs(want[:, start:end] - got).max() <= MAX_ABS, (start, end)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_adapters_add_up_exactly(
    layout: str,
    engine: str,
    fresh: Loader,
    adapter: Maker,
    merged: Callable[..., np.ndarray],
    ids: np.ndarray,
) -> None:
    model = fresh(layout, engine, adapter_slots="all")
    model.load_adapter(adapter("lora"), name="one")
    model.load_adapter(adapter("aflora"), name="two")
    model.set_adapters({"one": 0.5, "two": -1.5})
    want = merged(layout, ids[None], {adapter("lora"): 0.5, adapter("aflora"): -1.5})[0, ENDS]
    assert np.abs(want - said(model.session(), ids)).max() <= MAX_ABS
    model.set_adapters({"two": -1.5})  # fewer modules than before: the others must be empty again
    want = merged(layout, ids[None], {adapter("aflora"): -1.5})[0, ENDS]
    assert np.abs(want - said(model.session(), ids)).max() <= MAX_ABS


@pytest.mark.parametrize(("layout", "weights"), ROUNDED.items())
def test_beside_rounded_weights_a_slot_is_a_constant_side_path(
    layout: str, weights: str, engine: str, fresh: Loader, adapter: Maker, ids: np.ndarray
) -> None:
    model = fresh(layout, engine, weights=weights, adapter_slots="all")
    model.set_adapters({model.load_adapter(adapter("lora")): 1.0})
    beside = {"adapters": [adapter("lora")], "adapter_mode": "side-path"}
    constant = fresh(layout, engine, weights=weights, **beside)
    # An int8 activation at a rounding edge may fall either way.
    want = said(constant.session(), ids)
    assert_close("logits", want, said(model.session(), ids), ratio=0.02)


def test_a_sequence_keeps_its_adapters_and_a_reset_takes_the_new_ones(
    engine: str, fresh: Loader, adapter: Maker, ids: np.ndarray
) -> None:
    model = fresh("hybrid", engine, adapter_slots="all")
    base = said(model.session(), ids)
    model.set_adapters({model.load_adapter(adapter("lora")): 1.0})
    changed = said(model.session(), ids)
    session = model.session()
    first = session.append(ids[:70])
    model.set_adapters({})
    again = [first, *(session.append(ids[e - n : e]) for n, e in ((1, 71), (1, 72), (18, 90)))]
    np.testing.assert_array_equal(np.concatenate(again), changed)
    np.testing.assert_array_equal(said(model.session(), ids), base)
    session.reset()
    np.testing.assert_array_equal(said(session, ids), base)
    model.set_adapters({"lora": 1.0})
    for _ in range(2):  # a reset empties the states alone
        session.reset()
        np.testing.assert_array_equal(said(session, ids), changed)


def test_snapshots_hold_states_and_no_adapters(
    engine: str, fresh: Loader, adapter: Maker, ids: np.ndarray, tmp_path: Path
) -> None:
    model = fresh("hybrid", engine, adapter_slots="all")
    model.set_adapters({model.load_adapter(adapter("lora")): 1.0})
    session = model.session()
    session.append(ids[:70])
    here = session.snapshot()
    assert set(here.states) == {"0.conv", "0.ssm", "1.key", "1.value", "2.conv", "2.ssm"}
    want = session.append(ids[70:])
    session.restore(here)
    np.testing.assert_array_equal(session.append(ids[70:]), want)
    session.restore(here)
    session.save(tmp_path / "state")
    np.testing.assert_array_equal(model.session().load(tmp_path / "state").append(ids[70:]), want)
    model.set_adapters({})
    other = model.session()
    other.restore(here)
    assert np.abs(other.append(ids[70:]) - want).max() > 0.1


@pytest.mark.parametrize("layout", ["softmax", "kv_head"])
def test_batches_and_reordered_rows(
    layout: str,
    engine: str,
    fresh: Loader,
    adapter: Maker,
    merged: Callable[..., np.ndarray],
    ids: np.ndarray,
) -> None:
    model = fresh(layout, engine, adapter_slots="all")
    model.set_adapters({model.load_adapter(adapter("lora")): 1.0})
    session, rows = model.session(batch=3), ids.reshape(3, 30)
    session.append(rows)
    session.reorder([2, 0, 0])
    got = session.append([[5], [6], [7]])
    sequences = np.concatenate((rows[[2, 0, 0]], [[5], [6], [7]]), axis=1)
    want = merged(layout, sequences, {adapter("lora"): 1.0})[:, -1]
    assert np.abs(want - got).max() <= MAX_ABS


@pytest.mark.parametrize("layout", ["softmax", "hybrid"])
def test_text_and_beams_are_those_of_the_merged_bundle(
    layout: str, engine: str, fresh: Loader, adapter: Maker
) -> None:
    model = fresh(layout, engine, adapter_slots="all")
    fixed = fresh(layout, engine, adapters=[adapter("lora")])
    prompts = ["The river", "Once upon a time there was"]
    base = model.generate(prompts, max_new_tokens=12, ignore_eos=True)
    model.set_adapters({model.load_adapter(adapter("lora")): 1.0})
    for options in ({}, {"num_beams": 3}):
        want = fixed.generate(prompts, max_new_tokens=12, ignore_eos=True, **options)
        assert model.generate(prompts, max_new_tokens=12, ignore_eos=True, **options) == want
    assert base != want


def test_threads_never_see_half_an_adapter(
    engine: str, fresh: Loader, adapter: Maker, ids: np.ndarray
) -> None:
    model = fresh("kv_head", engine, adapter_slots="all")
    base = said(model.session(), ids)
    model.load_adapter(adapter("lora"))
    model.set_adapters({"lora": 1.0})
    changed = said(model.session(), ids)
    found: list[np.ndarray] = []

    def work() -> None:
        session = model.session()
        for _ in range(6):
            session.reset()
            found.append(said(session, ids))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        model.set_adapters({})
        model.set_adapters({"lora": 1.0})
    assert len(found) == 12
    for logits in found:
        assert min(np.abs(logits - whole).max() for whole in (base, changed)) <= MAX_ABS
