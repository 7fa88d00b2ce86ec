"""Examples become rows whole: what is learnt, how wide a batch is, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.adapters.tune.recipe import Recipe
from edgekit.adapters.tune.rows import Examples, read_rows
from edgekit.data.batch import IGNORE
from edgekit.errors import UsageError
from edgekit.runtime.text import Tokenizer

Small = Callable[..., Recipe]
EOS = 2


@pytest.fixture
def read(checkpoint: Path, small: Small, tmp_path: Path) -> Callable[..., Examples]:
    def make(*lines: object, held_out: Path | None = None, **options: object) -> Examples:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        back = bool(options.pop("hold_back", False))
        times = options.pop("times", "")
        tokenizer = Tokenizer(checkpoint)
        plan = small("lora", **options)
        return read_rows([f"{path}{times}"], held_out, plan, tokenizer, eos=EOS, hold_back=back)

    return make


def test_the_completion_alone_is_learnt(read: Callable[..., Examples], checkpoint: Path) -> None:
    tokenizer = Tokenizer(checkpoint)
    ((ids, targets),) = read({"prompt": "Say it:", "completion": " yes"}).train.rows
    whole = [*tokenizer.encode("Say it: yes"), EOS]
    assert ids.tolist() == whole[:-1]
    learnt = targets[targets != IGNORE].tolist()
    assert learnt == [*tokenizer.encode(" yes"), EOS]
    assert (targets[: -len(learnt)] == IGNORE).all()


def test_messages_and_texts_are_rows_too(read: Callable[..., Examples]) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    conversation, text = read({"messages": chat}, {"text": "abc"}).train.rows
    assert 0 < (conversation[1] != IGNORE).sum() < len(conversation[1])
    assert (text[1] != IGNORE).all()


def test_a_batch_is_as_wide_as_its_longest_row(read: Callable[..., Examples]) -> None:
    rows = read(*({"prompt": "a" * n, "completion": "b"} for n in (3, 9, 5))).train
    lengths = [len(ids) for ids, _ in rows.rows]
    batch = rows.batch([rows[0], rows[2]])
    assert batch["ids"].shape == batch["labels"].shape == (2, max(lengths[0], lengths[2]))
    assert batch["mask"].sum(dim=1).tolist() == [lengths[0], lengths[2]]
    assert (batch["labels"][0, lengths[0] :] == IGNORE).all()
    assert "mask" not in rows.batch([rows[1]])
    assert rows.labels == sum(int((targets != IGNORE).sum()) for _, targets in rows.rows)


def test_a_row_that_is_too_long_is_named_or_counted(read: Callable[..., Examples]) -> None:
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "x" * 99, "completion": "y"}]
    with pytest.raises(UsageError, match=r"a\.jsonl: line 2: 101 tokens, length 20; nothing is"):
        read(*lines, length=20)
    found = read(*lines, length=20, long_rows="drop").train
    assert (len(found), found.files[0]["rows"], found.files[0]["dropped"]) == (1, 1, 1)
    with pytest.raises(UsageError, match="no examples are left"):
        read(lines[1], length=20, long_rows="drop")


def test_part_is_held_back_and_not_learnt(read: Callable[..., Examples]) -> None:
    lines = [{"prompt": f"{n}", "completion": f"-{n}"} for n in range(200)]
    found = read(*lines, hold_back=True, times="@2")
    assert found.held_out is not None
    train, back = (
        {row[0].tobytes() for row in part.rows} for part in (found.train, found.held_out)
    )
    assert not train & back
    assert len(train) + len(back) == 200
    assert 8 <= len(back) <= 35
    assert len(found.train) == 2 * len(train)
    assert len(found.held_out) == len(back)
    again = read(*lines, hold_back=True, times="@2").held_out
    assert again is not None
    assert np.array_equal(again.rows[0][0], found.held_out.rows[0][0])


def test_only_jsonl_is_read(read: Callable[..., Examples], checkpoint: Path, small: Small) -> None:
    tokenizer = Tokenizer(checkpoint)
    with pytest.raises(UsageError, match=r"a\.txt given; allowed: \.jsonl files"):
        read_rows(["a.txt"], None, small("lora"), tokenizer, eos=EOS)
    with pytest.raises(UsageError, match="no data given"):
        read_rows([], None, small("lora"), tokenizer, eos=EOS)
    with pytest.raises(UsageError, match="line 1: nothing to predict"):
        read({"text": "<|im_end|>"})
