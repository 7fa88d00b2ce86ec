"""Long texts that hide one fact, and the question about it: for training and for evaluation.

- `passkey`: a five-digit number among filler sentences (Mohtashami and Jaggi, arXiv 2305.16300).
- `niah-1`, `niah-2`, `niah-3`: a needle in a haystack after RULER's single-needle tasks (arXiv
  2404.06654): filler with a seven-digit number, an essay with a seven-digit number, an essay with
  a UUID. Each value belongs to a key of two words.

The wording is edgekit's own. A prompt ends just before the answer, so that a model that completes
text answers at once. Training and evaluation share this file and differ in their seeds.
"""

import bisect
import functools
import itertools
import random
import re
import uuid
from collections.abc import Callable, Sized
from dataclasses import dataclass

from edgekit.data.words import word_pair
from edgekit.errors import UsageError

__all__ = ["DEPTHS", "EVALUATION_SEED", "KINDS", "Encode", "Sample", "make_sample", "needs_essay"]

KINDS = ("passkey", "niah-1", "niah-2", "niah-3")
DEPTHS = tuple(i / 39 for i in range(40))  # RULER's grid
EVALUATION_SEED = 2**31  # training draws seeds below it, evaluation from it upwards

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SENTENCE_WORDS = 40  # a longer sentence, or a text without any, is cut at words

Encode = Callable[[str], Sized]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One text with its question.

    Attributes:
        kind: one of `KINDS`.
        prompt: ends with the words that the answer follows.
        answer: what follows when the model is right, its leading space included.
        depth: where the needle lies; 0 is the haystack's beginning, 1 its end.
        length: tokens allowed for prompt, answer and room.
        tokens: tokens of prompt and answer together.
        laps: haystacks that fill the text, rounded up; above 1, sentences come again.
        seed: what made it.
    """

    kind: str
    prompt: str
    answer: str
    depth: float
    length: int
    tokens: int
    laps: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """Everything but the haystack."""

    opening: str
    needle: str
    closing: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Haystack:
    """Sentences, each with the space before it; `ends[i]` counts tokens of the first i + 1."""

    sentences: tuple[str, ...]
    ends: tuple[int, ...]

    def fitting(self, start: int, tokens: int) -> int:
        """How many sentences from `start` on, around the end, hold at most `tokens` tokens."""
        before = self.ends[start - 1] if start else 0
        laps, rest = divmod(before + tokens, self.ends[-1])
        return laps * len(self.ends) + bisect.bisect_right(self.ends, rest) - start

    def read(self, start: int, count: int) -> list[str]:
        """`count` sentences from `start` on, around the end."""
        around = itertools.islice(itertools.cycle(self.sentences), start, start + count)
        return list(around)


def needs_essay(kind: str) -> bool:
    """Whether the haystack of `kind` is a text that the user gives."""
    return kind in ("niah-2", "niah-3")


def make_sample(
    kind: str,
    *,
    length: int,
    seed: int,
    depth: float | None = None,
    encode: Encode,
    essay: str | None = None,
    answer_room: int = 0,
) -> Sample:
    """Hide a needle in as much haystack as `length` tokens take; the same arguments, the same text.

    An essay is read from a random sentence on, and around its end. Where no sentence fits, the text
    is the needle and its question alone.

    Args:
        kind: one of `KINDS`.
        length: at most so many tokens, and at most about one sentence fewer.
        seed: of key, value, haystack and depth.
        depth: 0 to 1; None: drawn from `DEPTHS`.
        encode: text to token ids, any that a prompt begins with included. The haystack's sentences
            are counted once per function, so give the same one each time.
        essay: the haystack of `niah-2` and `niah-3`.
        answer_room: tokens kept free after the answer.

    Raises:
        UsageError: for an unknown kind, a depth outside 0 to 1, an essay missing or without words,
            or a length that the prompt alone exceeds.
    """
    _check(kind, depth, essay)
    rng = random.Random(f"{kind} {length} {seed}")
    frame = _frame(kind, rng)
    at = rng.choice(DEPTHS) if depth is None else depth
    haystack = _haystack(encode, essay if needs_essay(kind) else None)
    start = rng.randrange(len(haystack.sentences)) if needs_essay(kind) else 0
    alone = len(encode(_prompt(frame, [], 0) + frame.answer)) + answer_room
    if alone > length:
        raise UsageError(
            f"length {length} given for {kind}; question, answer and room alone take {alone} "
            f"tokens: give {2 * alone} or so"
        )
    count = haystack.fitting(start, length - alone)
    prompt = _prompt(frame, haystack.read(start, count), at)
    while (tokens := len(encode(prompt + frame.answer))) + answer_room > length:
        count -= 1
        prompt = _prompt(frame, haystack.read(start, count), at)
    return Sample(
        kind=kind,
        prompt=prompt,
        answer=frame.answer,
        depth=at,
        length=length,
        tokens=tokens,
        laps=-(-count // len(haystack.sentences)),
        seed=seed,
    )


def _check(kind: str, depth: float | None, essay: str | None) -> None:
    if kind not in KINDS:
        raise UsageError(f"needle kind {kind!r} given; allowed: {', '.join(KINDS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise UsageError(f"depth {depth} given; allowed: 0 (the beginning) to 1 (the end)")
    if needs_essay(kind) and essay is None:
        raise UsageError(f"{kind} hides its needle in an essay; give a text file as the haystack")
    if needs_essay(kind) and not str(essay).strip():
        raise UsageError(f"the haystack of {kind} is empty; give a text file with some prose")


def _frame(kind: str, rng: random.Random) -> _Frame:
    if kind == "passkey":
        value = str(rng.randrange(10**4, 10**5))
        return _Frame(
            opening="One important fact is hidden inside a lot of irrelevant text. Find it and "
            "memorize it. I will quiz you about it afterwards.\n",
            needle=f" The pass key is {value}. Remember it. {value} is the pass key.",
            closing="\nWhat is the pass key? The pass key is",
            answer=f" {value}",
        )
    noun, value = "number", str(rng.randrange(10**6, 10**7))
    if kind == "niah-3":
        noun, value = "uuid", str(uuid.UUID(int=rng.getrandbits(128), version=4))
    key = word_pair(rng)
    asked = f"special magic {noun} for {key} that the text mentions"
    return _Frame(
        opening=f"A special magic {noun} is hidden within the following text. Memorize it. "
        f"I will quiz you about the {noun} afterwards.\n",
        needle=f" One of the special magic {noun}s for {key} is: {value}.",
        closing=f"\nWhat is the {asked}? The {asked} is",
        answer=f" {value}",
    )


def _prompt(frame: _Frame, sentences: list[str], depth: float) -> str:
    at = round(depth * len(sentences))
    text = "".join([*sentences[:at], frame.needle, *sentences[at:]])
    return frame.opening + text.lstrip() + frame.closing


@functools.lru_cache(maxsize=8)
def _haystack(encode: Encode, essay: str | None) -> _Haystack:
    sentences = _filler() if essay is None else _sentences(essay)
    # A tokenizer may put a space before a text; after a full stop none can.
    counts = [len(encode("." + sentence)) - len(encode(".")) for sentence in sentences]
    return _Haystack(tuple(sentences), tuple(itertools.accumulate(counts)))


def _filler() -> list[str]:
    return [f"\n{FILLER[0]}", *(f" {sentence}" for sentence in FILLER[1:])]


def _sentences(essay: str) -> list[str]:
    """Sentences of at most SENTENCE_WORDS words, each after one space."""
    words = (sentence.split() for sentence in SENTENCE_END.split(essay.strip()))
    return [
        " " + " ".join(part[i : i + SENTENCE_WORDS])
        for part in words
        for i in range(0, len(part), SENTENCE_WORDS)
    ]
