"""Sessions of every kind of bundle on both engines, token by token against the torch decoder."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.runtime import Model, Session
from edgekit.testing import TOLERANCE, assert_close

Loader = Callable[..., Model]
Reference = Callable[[str], Callable[..., np.ndarray]]
RAGGED = (1, 63, 2, 5, 64, 1, 14)
FP32 = TOLERANCE["float32"]


def appended(session: Session, ids: np.ndarray, blocks: tuple[int, ...]) -> list[np.ndarray]:
    """Logits after each block of `ids [T]`."""
    ends = np.cumsum(blocks)
    return [session.append(ids[end - n : end]) for n, end in zip(blocks, ends, strict=True)]


def test_ragged_blocks_and_steps(
    opened: Loader, reference: Reference, ids: np.ndarray, kind: str, engine: str
) -> None:
    session = opened(kind, engine).session()
    blocks = (*RAGGED, 1, 1, 1)
    sequence = np.concatenate((ids, [5, 250, 7]))
    got = np.concatenate(appended(session, sequence, blocks))
    want = reference(kind)(sequence[None])[0, np.cumsum(blocks) - 1]
    assert_close("logits", want, got, ratio=FP32)
    assert got.dtype == np.float32
    assert session.position == len(sequence)


def test_a_prompt_longer_than_several_prefill_blocks(
    opened: Loader, reference: Reference, kind: str, engine: str
) -> None:
    model = opened(kind, engine)
    ids = np.random.default_rng(1).integers(3, 320, 500)
    whole = Session(
        model._compiled, model.manifest, name=engine, logits="last", block=37, batch=1
    ).append(ids)
    want = reference(kind)(ids[None])[:, -1]
    assert_close("in blocks of 37", want, whole, ratio=FP32)
    assert_close("in the target's blocks", want, model.session().append(ids), ratio=FP32)


def test_all_positions(
    opened: Loader, reference: Reference, ids: np.ndarray, kind: str, engine: str
) -> None:
    session = opened(kind, engine, logits="all").session()
    got = np.concatenate([session.append(ids[:141]), session.append(ids[141:])], axis=1)
    assert_close("logits", reference(kind)(ids[None]), got, ratio=FP32)


@pytest.fixture
def padded(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Three rows of 7, 20 and 3 tokens, padded on the left."""
    tokens, mask = np.zeros((3, 20), np.int64), np.zeros((3, 20), np.int64)
    for row, length in enumerate((7, 20, 3)):
        tokens[row, 20 - length :] = ids[20 * row : 20 * row + length]
        mask[row, 20 - length :] = 1
    return tokens, mask


def test_left_padding_is_a_no_op(
    opened: Loader,
    reference: Reference,
    padded: tuple[np.ndarray, np.ndarray],
    kind: str,
    engine: str,
) -> None:
    tokens, mask = padded
    session = opened(kind, engine).session(batch=3)
    first = session.append(tokens[:, :15], mask[:, :15])
    first = session.append(tokens[:, 15:], mask[:, 15:])
    second = session.append([[9], [8], [7]])
    third = session.append(np.array([[1, 2], [3, 4], [5, 6]]))
    for row, length in enumerate((7, 20, 3)):
        more = [[9, 1, 2], [8, 3, 4], [7, 5, 6]][row]
        sequence = np.concatenate((tokens[row, 20 - length :], more))
        want = reference(kind)(sequence[None])[0]
        assert_close(f"row {row}", want[length - 1], first[row], ratio=FP32)
        assert_close(f"row {row} step", want[length], second[row], ratio=FP32)
        assert_close(f"row {row} block", want[-1], third[row], ratio=FP32)


def test_padding_after_a_token_is_refused(opened: Loader, engine: str) -> None:
    session = opened("hybrid", engine).session(batch=2)
    session.append([[0, 5], [0, 0]], [[0, 1], [0, 0]])  # the second row has not begun
    with pytest.raises(UsageError, match="padding after a token"):
        session.append([[0, 6], [0, 7]], [[0, 1], [0, 1]])
    assert session.position == 2
    session.append([[6, 7], [0, 7]], [[1, 1], [0, 1]])


def test_reorder_repeats_drops_and_shrinks(
    opened: Loader, reference: Reference, ids: np.ndarray, kind: str, engine: str
) -> None:
    session = opened(kind, engine).session(batch=3)
    rows = ids[:60].reshape(3, 20)
    session.append(rows)
    session.reorder([2, 0])
    session.reorder([1, 0, 0, 1])  # of the two rows above: rows 0, 2, 2, 0
    assert session.batch == 4
    got = session.append([[5], [6], [5], [6]])
    sources = np.stack([rows[i] for i in (0, 2, 2, 0)])
    sequence = np.concatenate((sources, [[5], [6], [5], [6]]), axis=1)
    assert_close("logits", reference(kind)(sequence)[:, -1], got, ratio=FP32)
    session.reset()
    assert session.position == 0
    assert_close(
        "after reset", reference(kind)(sequence)[:, -1], session.append(sequence), ratio=FP32
    )


def test_an_empty_session_reorders_its_rows(opened: Loader, kind: str, engine: str) -> None:
    session = opened(kind, engine).session()
    session.reorder([0, 0])
    got = session.append([[5, 6], [5, 7]])
    assert_close("first row", opened(kind, engine).session().append([5, 6])[0], got[0], ratio=FP32)


def test_sessions_do_not_disturb_each_other(
    opened: Loader, ids: np.ndarray, kind: str, engine: str
) -> None:
    model = opened(kind, engine)
    alone = [appended(model.session(), ids[i:], RAGGED[:5]) for i in (0, 10)]
    left, right = model.session(), model.session()
    for step, (n, end) in enumerate(zip(RAGGED[:5], np.cumsum(RAGGED[:5]), strict=True)):
        np.testing.assert_array_equal(left.append(ids[end - n : end]), alone[0][step])
        np.testing.assert_array_equal(right.append(ids[10:][end - n : end]), alone[1][step])


def test_sessions_run_in_threads(opened: Loader, ids: np.ndarray, kind: str, engine: str) -> None:
    model = opened(kind, engine)
    want = [appended(model.session(), ids[i:], (20, 1, 1, 1)) for i in range(4)]
    got: dict[int, list[np.ndarray]] = {}

    def run(i: int) -> None:
        got[i] = appended(model.session(), ids[i:], (20, 1, 1, 1))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for step in range(4):
            assert_close("logits", want[i][step], got[i][step], ratio=FP32)


def test_returned_logits_stay_as_they_are(opened: Loader, kind: str, engine: str) -> None:
    session = opened(kind, engine).session()
    first = session.append([5])
    before = first.copy()
    session.append([6])
    np.testing.assert_array_equal(first, before)


def test_state_bytes(opened: Loader, ids: np.ndarray, kind: str, engine: str) -> None:
    session = opened(kind, engine).session(batch=2)
    sizes = []
    for _ in range(3):
        session.append(np.stack((ids[:40], ids[40:80])))
        held = session.snapshot().states.values()
        assert session.state_bytes == sum(array.nbytes for array in held)
        sizes.append(session.state_bytes)
    assert (len(set(sizes)) == 1) == (kind in ("q_head", "kv_head"))


def test_keys_and_values_grow_by_the_token(opened: Loader, engine: str) -> None:
    session = opened("softmax", engine).session()
    session.append([5, 6, 7])
    assert session.state_bytes == 3 * 2 * 3 * 2 * 16 * 4  # layers, k and v, S, heads, width, fp32


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        ([], None, "at least one token"),
        ([[1], [2]], None, r"shape \(2, 1\) given; allowed: \[1, T\] or \[T\]"),
        (5, None, r"shape \(\) given"),
        ([1.0, 2.0], None, "dtype float64"),
        ([1, 320], None, "token id 320 .* 0 to 319"),
        ([1, -1], None, "token id -1"),
        ([1, 2], [1], "mask of shape"),
        ([1, 2], [1, 2], "0 and 1"),
        ([1, 2], [0.5, 1.0], "0 and 1"),
        ([1, 2], [1, 0], "padding after a token"),
    ],
    ids=str,
)
def test_wrong_arrays_are_refused(
    opened: Loader, engine: str, ids: object, mask: object, says: str
) -> None:
    session = opened("hybrid", engine).session()
    with pytest.raises(UsageError, match=says):
        session.append(ids, mask)
    assert session.position == 0


@pytest.mark.parametrize("rows", [[], [1], [-1], [0.0], [[0]]], ids=str)
def test_wrong_rows_are_refused(opened: Loader, engine: str, rows: list[object]) -> None:
    session = opened("q_head", engine).session()
    with pytest.raises(UsageError, match="allowed"):
        session.reorder(rows)


@pytest.mark.parametrize("batch", [0, -1, 1.5], ids=str)
def test_wrong_batch_is_refused(opened: Loader, engine: str, batch: int) -> None:
    with pytest.raises(UsageError, match="batch"):
        opened("q_head", engine).session(batch=batch)


@pytest.mark.parametrize("kept", ["softmax", "hybrid"])
def test_the_context_is_never_overrun(opened: Loader, engine: str, kept: str) -> None:
    session = opened(kept, engine).session()
    session.append(np.full(500, 9))
    with pytest.raises(UsageError, match=r"513 tokens given; .* at most 512"):
        session.append(np.full(13, 9))
    assert session.position == 500
    session.append(np.full(12, 9))
    assert session.room == 0
    with pytest.raises(UsageError, match="at most 512"):
        session.append([9])


def test_padding_does_not_use_the_context_up(opened: Loader, engine: str) -> None:
    session = opened("softmax", engine).session()
    session.append(np.full(20, 9), [0] * 10 + [1] * 10)
    assert session.room == 512 - 10


@pytest.mark.parametrize("kept", ["softmax", "hybrid"])
def test_padding_does_not_end_a_row_at_the_context(
    opened: Loader, ids: np.ndarray, engine: str, kept: str
) -> None:
    tokens, mask = np.full((2, 500), 9), np.ones((2, 500), np.int64)
    tokens[1, 495:], mask[1, :495] = ids[:5], 0
    session = opened(kept, engine).session(batch=2)
    session.append(tokens, mask)
    session.reorder([1])
    alone = opened(kept, engine).session()
    alone.append(ids[:5])
    more = ids[5:45]  # to column 540 of 512
    assert_close("logits", alone.append(more), session.append(more), ratio=FP32)


def test_recurrent_models_have_no_limit(opened: Loader, engine: str) -> None:
    session = opened("kv_head", engine).session()
    assert session.room is None
    assert np.isfinite(session.append(np.full(700, 9))).all()
