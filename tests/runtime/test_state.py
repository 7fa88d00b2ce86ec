"""Snapshots and saved states: bit exact, and refused where they do not belong."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import BundleError, UsageError
from edgekit.runtime import Model, Session, load

Loader = Callable[..., Model]


def steps(session: Session, tokens: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.concatenate([session.append(np.full((session.batch, 1), t)) for t in tokens])


def test_restore_is_bit_exact(opened: Loader, ids: np.ndarray, kind: str, engine: str) -> None:
    session = opened(kind, engine).session()
    session.append(ids)
    here = session.snapshot()
    first = steps(session)
    session.append(ids[:30])
    session.restore(here)
    assert session.position == len(ids)
    np.testing.assert_array_equal(steps(session), first)
    again = session.snapshot()
    session.restore(here)
    for key, state in session.snapshot().states.items():
        np.testing.assert_array_equal(state, here.states[key])
    assert again.position == len(ids) + 3


def test_save_and_load_into_another_session(
    opened: Loader, ids: np.ndarray, kind: str, engine: str, tmp_path: Path
) -> None:
    model = opened(kind, engine)
    session = model.session(batch=2)
    tokens = ids[:60].reshape(2, 30)
    session.append(tokens, (tokens[:, :1] > 0) * np.r_[np.zeros(9), np.ones(21)].astype(int))
    session.save(tmp_path / "state.safetensors")
    first = steps(session)
    loaded = model.session(batch=2).load(tmp_path / "state.safetensors")
    assert loaded.position == 30
    np.testing.assert_array_equal(steps(loaded), first)


def test_a_snapshot_stays_as_it_was(
    opened: Loader, ids: np.ndarray, kind: str, engine: str
) -> None:
    session = opened(kind, engine).session()
    session.append(ids[:9])
    here = session.snapshot()
    before = {key: state.copy() for key, state in here.states.items()}
    other = opened(kind, engine).session()
    other.restore(here)
    steps(session)
    steps(other)
    for key, state in here.states.items():
        np.testing.assert_array_equal(state, before[key])


def test_snapshot_of_an_empty_session(opened: Loader, kind: str, engine: str) -> None:
    session = opened(kind, engine).session()
    empty = session.snapshot()
    first = steps(session)
    session.restore(empty)
    assert session.position == 0
    np.testing.assert_array_equal(steps(session), first)


def test_snapshot_after_a_reorder(opened: Loader, kind: str, engine: str) -> None:
    session = opened(kind, engine).session(batch=2)
    session.append([[5, 6], [7, 8]])
    session.reorder([1, 1])
    here = session.snapshot()
    first = steps(session)
    session.restore(here)
    np.testing.assert_array_equal(steps(session), first)
    for state in here.states.values():
        np.testing.assert_array_equal(state[0], state[1])


def saved(model: Model, path: Path) -> Path:
    session = model.session()
    session.append([5, 6, 7])
    session.save(path)
    return path


def test_another_batch_is_refused(opened: Loader, engine: str, tmp_path: Path) -> None:
    model = opened("hybrid", engine)
    path = saved(model, tmp_path / "state")
    with pytest.raises(UsageError, match="has 1 rows, this session 2"):
        model.session(batch=2).load(path)
    with pytest.raises(UsageError, match="rows"):
        model.session(batch=2).restore(model.session().snapshot())


def test_another_engine_is_refused(opened: Loader, tmp_path: Path) -> None:
    path = saved(opened("hybrid", "openvino"), tmp_path / "state")
    with pytest.raises(BundleError, match="made on openvino, this is onnx"):
        opened("hybrid", "onnx").session().load(path)


def test_another_bundle_is_refused(opened: Loader, engine: str, tmp_path: Path) -> None:
    path = saved(opened("q_head", engine), tmp_path / "state")
    with pytest.raises(BundleError, match="another bundle"):
        opened("kv_head", engine).session().load(path)


def test_a_foreign_shape_is_refused(opened: Loader, engine: str) -> None:
    session = opened("q_head", engine).session()
    session.append([5])
    here = session.snapshot()
    wrong = {key: state[..., :-1] for key, state in here.states.items()}
    with pytest.raises(BundleError, match="expected float32"):
        session.restore(dataclasses.replace(here, states=wrong))
    narrow = {key: state.astype(np.float16) for key, state in here.states.items()}
    with pytest.raises(BundleError, match="float16"):
        session.restore(dataclasses.replace(here, states=narrow))
    with pytest.raises(BundleError, match="not those of this bundle"):
        session.restore(dataclasses.replace(here, states={}))


def test_a_mask_must_be_there_where_states_grow(opened: Loader, engine: str, kind: str) -> None:
    session = opened(kind, engine).session()
    session.append([5, 6])
    here = session.snapshot()
    wrong = np.ones((1, 2), np.int64) if here.mask is None else None
    with pytest.raises(BundleError, match="attention mask"):
        session.restore(dataclasses.replace(here, mask=wrong))


@pytest.mark.parametrize("size", [0, 5, 100, -10], ids=str)
def test_a_truncated_file_is_refused(
    opened: Loader, engine: str, tmp_path: Path, size: int
) -> None:
    model = opened("hybrid", engine)
    path = saved(model, tmp_path / "state")
    path.write_bytes(path.read_bytes()[:size])
    session = model.session()
    with pytest.raises(BundleError, match="state: "):
        session.load(path)
    assert session.position == 0


def test_missing_and_unwritable_files(opened: Loader, engine: str, tmp_path: Path) -> None:
    session = opened("q_head", engine).session()
    with pytest.raises(BundleError, match="absent"):
        session.load(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot be written"):
        session.save(tmp_path / "no" / "folder" / "state")


def test_a_plain_safetensors_file_is_refused(opened: Loader, engine: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "x")
    with pytest.raises(BundleError, match="not a saved state"):
        opened("q_head", engine).session().load(tmp_path / "x")


def test_a_copy_of_the_bundle_takes_the_state(
    bundle: Callable[[str], Path], opened: Loader, engine: str, tmp_path: Path
) -> None:
    path = saved(opened("q_head", engine), tmp_path / "state")
    copy = Path(shutil.copytree(bundle("q_head"), tmp_path / "copy"))
    manifest = json.loads((copy / "edgekit.json").read_text())
    (copy / "edgekit.json").write_text(json.dumps(manifest))
    assert load(copy, engine=engine).session().load(path).position == 3
