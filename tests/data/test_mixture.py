import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.config import dump
from edgekit.data import IGNORE, Batch, Mixture, NeedleShare, read_corpus
from edgekit.errors import UsageError
from edgekit.runtime.text import Tokenizer

EOS, LENGTH = 2, 32
NEEDLES = NeedleShare(share=0.25, kinds=("passkey",), lengths=(400, 512))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    texts, chats = tmp_path / "texts.txt", tmp_path / "chats.jsonl"
    texts.write_text(
        "\f".join(f"Text {i} says {list(range(i * i, i * i + i))}." for i in range(40))
    )
    turns = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"Yes, {i}."}]
        for i in range(20)
    ]
    chats.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    return [texts, chats]


def mixed(
    files: Sequence[Path | str],
    tokenizer: Tokenizer,
    *,
    length: int = LENGTH,
    seed: int = 7,
    needles: NeedleShare | None = None,
    **options: Any,
) -> Mixture:
    corpus = read_corpus(files, tokenizer, **{"eos": EOS, **options})
    return corpus.mix(length=length, seed=seed, needles=needles)


def same(a: Batch, b: Batch) -> bool:
    masks = [np.ones(x.ids.shape, bool) if x.mask is None else x.mask for x in (a, b)]
    return (
        np.array_equal(a.ids, b.ids)
        and np.array_equal(a.targets, b.targets)
        and np.array_equal(*masks)
    )


def counted(batch: Batch) -> collections.Counter[int]:
    ids = batch.ids if batch.mask is None else batch.ids[batch.mask]
    return collections.Counter(ids.ravel().tolist())


@pytest.mark.parametrize("length", [1, 7, LENGTH, 10**5])
def test_an_epoch_holds_every_token_once(files: list[Path], tiny: Tokenizer, length: int) -> None:
    data = mixed(files, tiny, length=length)
    documents = [[*tiny.encode(text).tolist(), EOS] for text in files[0].read_text().split("\f")]
    for line in files[1].read_text().splitlines():
        prompt = tiny.chat_prompt(json.loads(line)["messages"], add_generation_prompt=False)
        documents.append(tiny.encode_prompt(prompt).tolist())
    expected = collections.Counter(token for document in documents for token in document)
    assert data.tokens == expected.total()
    for epoch in (0, 3):
        missing = expected - counted(data.batch(epoch * data.rows, data.rows))
        assert missing.total() == 1  # the stream's last token is only ever predicted


def test_targets_are_what_follows(files: list[Path], tiny: Tokenizer) -> None:
    data = mixed(files, tiny, length=8, chat_loss="all")
    batch = data.batch(0, data.rows)
    inside = batch.targets[:, :-1], batch.ids[:, 1:]
    learnt = inside[0] != IGNORE
    assert learnt.mean() > 0.8
    assert (inside[0] == inside[1])[learnt].all()
    starts = len(files[0].read_text().split("\f")) + len(files[1].read_text().splitlines())
    unknown = data.tokens - 1 - np.count_nonzero(batch.targets != IGNORE)
    assert unknown == starts - 1  # no document's first token; the stream's own is no target


def test_conversations_teach_answers_only(files: list[Path], tiny: Tokenizer) -> None:
    data = mixed(files[1:], tiny, length=10**4)
    targets = data.batch(0, 1).targets[0]
    said = tiny.decode(targets[targets != IGNORE], skip_special_tokens=False)
    answers = said.split("<|im_end|>")[:-1]
    assert sorted(answers) == sorted(f"Yes, {i}." for i in range(20))


def test_padding_is_only_at_the_end(files: list[Path], tiny: Tokenizer) -> None:
    data = mixed(files, tiny)
    batch = data.batch(0, data.rows)
    assert batch.ids.shape == batch.targets.shape == (data.rows, LENGTH)
    assert (np.diff(batch.mask.astype(int), axis=1) <= 0).all()
    assert batch.mask.sum() == data.tokens - 1
    assert (batch.targets[~batch.mask] == IGNORE).all()
    whole = [i for i in range(data.rows) if batch.mask[i].all()]
    assert len(whole) == data.rows - 1
    assert data.batch(whole[0], 1).mask is None


@pytest.mark.parametrize("needles", [None, NEEDLES], ids=["text", "needles"])
def test_rows_depend_on_their_number_alone(
    files: list[Path], tiny: Tokenizer, needles: NeedleShare | None
) -> None:
    first, again = (mixed(files, tiny, length=512, needles=needles) for _ in range(2))
    for start in (0, 995, 123_456):  # a block of needles ends at 1000
        whole = first.batch(start, 12)
        again.batch(5, 3)
        parts = [again.batch(start + at, 4) for at in (8, 4, 0)]
        for at, part in zip((8, 4, 0), parts, strict=True):
            rows = slice(at, at + 4)
            assert np.array_equal(part.ids, whole.ids[rows])
            assert np.array_equal(part.targets, whole.targets[rows])


def test_two_ranks_read_disjoint_rows_that_cover_an_epoch(
    files: list[Path], tiny: Tokenizer
) -> None:
    ranks = [mixed(files, tiny) for _ in range(2)]
    read: collections.Counter[bytes] = collections.Counter()
    rows = ranks[0].rows
    for number in range(rows):
        read[ranks[number % 2].batch(number, 1).ids.tobytes()] += 1
    assert len(read) == rows


def test_seeds_and_epochs_differ(files: list[Path], tiny: Tokenizer) -> None:
    data, other = mixed(files, tiny), mixed(files, tiny, seed=8)
    assert not same(data.batch(0, 8), other.batch(0, 8))
    assert not same(data.batch(0, data.rows), data.batch(data.rows, data.rows))


def test_needles_have_their_share_and_no_text_is_lost(files: list[Path], tiny: Tokenizer) -> None:
    data = mixed(files, tiny, length=512, needles=NEEDLES)
    text = mixed(files, tiny, length=512)
    texts = {text.batch(number, 1).ids.tobytes() for number in range(text.rows)}
    read = [row.tobytes() for row in data.batch(0, 1100).ids]  # a block is 1000 rows
    assert sum(row in texts for row in read[:1000]) == 750
    read = [row for row in read if row in texts]
    for start in range(0, len(read) - text.rows + 1, text.rows):
        assert set(read[start : start + text.rows]) == texts


def test_needles_teach_their_answer(tiny: Tokenizer) -> None:
    data = mixed([], tiny, length=512, needles=NeedleShare(share=1.0, lengths=(400, 512)))
    batch = data.batch(0, 20)
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        answer = tiny.decode(targets[targets != IGNORE], skip_special_tokens=False)
        assert answer.endswith("<|im_end|>")
        text = tiny.decode(ids)
        assert text.count(answer.removesuffix("<|im_end|>")) >= 2  # in the needle and at the end
    lengths = batch.mask.sum(axis=1)
    assert set(lengths > 400) == {False, True}


def test_needles_lie_where_they_are_asked_for(tiny: Tokenizer) -> None:
    def heads(depths: tuple[float, ...] | None) -> list[bool]:
        share = NeedleShare(share=1.0, kinds=("passkey",), lengths=(512,), depths=depths)
        batch = mixed([], tiny, length=512, needles=share).batch(0, 20)
        return ["pass key is" in tiny.decode(ids[:200]) for ids in batch.ids]

    assert all(heads((0.0, 0.1)))
    assert not any(heads((0.9, 1.0)))
    assert set(heads(None)) == {False, True}


def test_a_corpus_is_read_once_for_several_stages(files: list[Path], tiny: Tokenizer) -> None:
    corpus = read_corpus(files, tiny, eos=EOS)
    for length, seed, needles in ((16, 1, None), (512, 2, NEEDLES)):
        stage = corpus.mix(length=length, seed=seed, needles=needles)
        alone = mixed(files, tiny, length=length, seed=seed, needles=needles)
        assert stage.files == alone.files
        assert same(stage.batch(3, 5), alone.batch(3, 5))


@pytest.mark.parametrize("form", ["at", "repeated"])
def test_a_file_can_come_more_often(files: list[Path], tiny: Tokenizer, form: str) -> None:
    texts, chats = files
    given = [f"{texts}@3", chats] if form == "at" else [texts, chats, texts, texts]
    once, often = mixed(files, tiny), mixed(given, tiny)
    assert [file.times for file in often.files] == [3, 1]
    assert often.tokens == 3 * once.files[0].tokens + once.files[1].tokens
    rows = counted(often.batch(0, often.rows))
    assert rows[EOS] > 100  # of 120 texts; some end a row and are only predicted


def test_a_file_that_never_comes_is_refused(files: list[Path], tiny: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"texts.txt@0 given; allowed after @: 1 or more"):
        mixed([f"{files[0]}@0"], tiny)


def test_files_are_recorded(files: list[Path], tiny: Tokenizer) -> None:
    said: list[tuple[str, int, int]] = []
    data = mixed(files, tiny, progress=lambda *step: said.append(step))
    assert said == [("reading texts.txt", 0, 2), ("reading chats.jsonl", 1, 2)]
    assert [(file.name, file.documents) for file in data.files] == [
        ("texts.txt", 40),
        ("chats.jsonl", 20),
    ]
    assert sum(file.tokens for file in data.files) == data.tokens
    assert json.loads(json.dumps(dump(data.files)))[0]["sha256"] == data.files[0].sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"length": 0}, "length 0 given", id="length"),
        pytest.param({"seed": -1}, "seed -1 given", id="seed"),
        pytest.param({"needles": NEEDLES}, "needles of 512 tokens given for rows of 32", id="long"),
    ],
)
def test_bad_options(
    files: list[Path], tiny: Tokenizer, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        mixed(files, tiny, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"share": 1.5}, "allowed: 0 to 1", id="share"),
        pytest.param({"share": 0.1, "kinds": ("niah-9",)}, "allowed: passkey", id="kind"),
        pytest.param({"share": 0.1, "kinds": ("niah-2",)}, "essay", id="essay"),
        pytest.param({"share": 0.1, "lengths": ()}, "no lengths", id="lengths"),
        pytest.param({"share": 0.1, "depths": (0.5, 1.5)}, "one or more, 0 to 1", id="depths"),
        pytest.param({"share": 0.1, "depths": ()}, "one or more, 0 to 1", id="no depths"),
    ],
)
def test_bad_shares(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NeedleShare(**options)


def test_nothing_to_train_on(tiny: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no text to train on"):
        mixed([], tiny)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 0)])
def test_bad_rows(files: list[Path], tiny: Tokenizer, start: int, count: int) -> None:
    with pytest.raises(UsageError, match="allowed: from 0, 1 or more"):
        mixed(files, tiny).batch(start, count)
