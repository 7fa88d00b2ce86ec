"""Conversations that a chat model has with itself, to distil it where no chat data may be used.

    python -m edgekit.data.selftalk BUNDLE -o FILE.jsonl --count N [--questions FILE]

Given only the opening of a user's turn, the model samples the question; then it answers (Magpie:
Xu et al., arXiv 2406.08464). Half of the questions come from templates instead, for breadth.
"""

import argparse
import collections
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekit.command import guarded
from edgekit.data.quality import flaw_of_answer, flaw_of_question, whole_paragraphs
from edgekit.data.questions import template_question
from edgekit.data.talkfile import TalkFile, Turn
from edgekit.errors import EdgekitError, UsageError
from edgekit.runtime import load
from edgekit.utf8 import read_text

if TYPE_CHECKING:
    from edgekit.runtime import Model

__all__ = ["SelfTalk", "TalkSettings", "collect", "main", "talk"]

PLACEHOLDER = "\x00"  # stands for the question while the template is rendered
FINISHED = "end of text"
PATIENCE = 20  # batches in a row without one usable conversation
LINE_EVERY = 10.0  # seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class TalkSettings:
    """How a model talks to itself.

    Attributes:
        seed: of everything; a batch's conversations depend on it, the batch and its number alone.
        batch: conversations side by side.
        max_new_tokens: of an answer that has not ended by then, the whole paragraphs are kept.
        max_question_tokens: a question that has not ended by then is not kept.
        question_temperature: high, so that questions differ.
        answer_temperature: low, so that answers are what the model thinks.
        top_p: of both.
    """

    seed: int = 0
    batch: int = 16
    max_new_tokens: int = 256
    max_question_tokens: int = 64
    question_temperature: float = 0.9
    answer_temperature: float = 0.5
    top_p: float = 0.95

    def __post_init__(self) -> None:
        """Check the batch and the seed; the model checks the rest.

        Raises:
            UsageError: for a batch below 1 or a negative seed.
        """
        if self.batch < 1 or self.seed < 0:
            raise UsageError(
                f"batch {self.batch} and seed {self.seed} given; allowed: from 1, from 0"
            )


class SelfTalk:
    """Draws conversations from a chat model."""

    def __init__(
        self, model: "Model", settings: TalkSettings, questions: Sequence[str] | None = None
    ) -> None:
        """Prepare; nothing is computed yet.

        Args:
            model: with a chat template.
            settings: how to sample.
            questions: answer these; None: half from templates, half the model's own.

        Raises:
            UsageError: if the model has no chat template.
        """
        self._model, self._settings, self._questions = model, settings, questions
        self.opening = model.chat_prompt(
            [{"role": "user", "content": PLACEHOLDER}], add_generation_prompt=False
        ).partition(PLACEHOLDER)[0]
        self.new_tokens = 0

    def batches(self, first: int) -> Iterator[list[Turn]]:
        """Batches from conversation `first` on, as long as there are questions to answer."""
        for start in itertools.count(first, self._settings.batch):
            asked = self._given(start) if self._questions is not None else self._asked(start)
            if not asked:
                return
            yield self._answered(start, asked)

    def _given(self, start: int) -> list[Turn]:
        lines = (self._questions or ())[start : start + self._settings.batch]
        return [Turn(i, "given", text) for i, text in enumerate(lines, start)]

    def _asked(self, start: int) -> list[Turn]:
        indices = range(start, start + self._settings.batch)
        turns = [self._from_template(index) for index in indices if index % 2 == 0]
        own = [index for index in indices if index % 2]
        texts = self._sample(
            [self.opening] * len(own),
            start,
            temperature=self._settings.question_temperature,
            max_new_tokens=self._settings.max_question_tokens,
        )
        for index, (text, ended) in zip(own, texts, strict=True):
            flaw = flaw_of_question(text) if ended else "question too long"
            turns.append(Turn(index, "own", text, flaw=flaw))
        return sorted(turns)

    def _from_template(self, index: int) -> Turn:
        text = template_question(np.random.default_rng([self._settings.seed, index]))
        return Turn(index, "template", text)

    def _answered(self, start: int, turns: Sequence[Turn]) -> list[Turn]:
        sound = [turn for turn in turns if turn.flaw is None]
        prompts = [
            self._model.chat_prompt([{"role": "user", "content": turn.question}]) for turn in sound
        ]
        answers = self._sample(
            prompts,
            start + 1,  # not the seed of the questions
            temperature=self._settings.answer_temperature,
            max_new_tokens=self._settings.max_new_tokens,
        )
        done = [turn for turn in turns if turn.flaw is not None]
        for turn, (text, ended) in zip(sound, answers, strict=True):
            answer = text if ended else whole_paragraphs(text)
            flaw = flaw_of_answer(answer) if answer or ended else "answer too long"
            done.append(turn._replace(answer=answer, cut=not ended, flaw=flaw))
        return sorted(done)

    def _sample(
        self, prompts: list[str], stream: int, *, temperature: float, max_new_tokens: int
    ) -> list[tuple[str, bool]]:
        """The text that follows each prompt, and whether it ended by itself."""
        if not prompts:
            return []
        seed = np.random.SeedSequence([self._settings.seed, stream]).generate_state(1)
        texts = self._model.generate(
            prompts,
            temperature=temperature,
            top_p=self._settings.top_p,
            max_new_tokens=max_new_tokens,
            seed=int(seed[0]),
        )
        stats = self._model.last_stats
        assert stats is not None  # a generation has just ended
        self.new_tokens += stats.new_tokens
        return [
            (text.strip(), ending == FINISHED)
            for text, ending in zip(texts, stats.endings, strict=True)
        ]


def collect(
    batches: Iterable[Sequence[Turn]], file: TalkFile, count: int, say: Callable[[str], None]
) -> None:
    """Add sound conversations to `file` until it holds `count`, no question twice.

    Args:
        batches: conversations from number `file.next` on.
        file: what is there already.
        count: conversations to have in it.
        say: told now and then how far it is.

    Raises:
        EdgekitError: if PATIENCE batches in a row hold nothing usable.
    """
    flaws: collections.Counter[str] = collections.Counter()
    started, said, fruitless, before = time.perf_counter(), 0.0, 0, file.count
    for turns in batches if file.count < count else ():
        kept = []
        for turn in turns:
            flaw = turn.flaw or ("asked before" if turn.question in file.questions else None)
            if flaw is None:
                kept.append(turn)
                file.questions.add(turn.question)
            else:
                flaws[flaw] += 1
        file.append(kept[: count - file.count])
        fruitless = 0 if kept else fruitless + 1
        if fruitless == PATIENCE:
            raise EdgekitError(f"{PATIENCE} batches without one usable conversation: {dict(flaws)}")
        seconds = time.perf_counter() - started
        if seconds - said >= LINE_EVERY or file.count >= count:
            said = seconds
            rate = (file.count - before) / seconds
            dropped = ", ".join(f"{flaw} {n}" for flaw, n in flaws.most_common())
            say(f"[{file.count}/{count}] {rate:.2f} per second; dropped: {dropped or 'none'}")
        if file.count >= count:
            return


def talk(
    model: "Model",
    path: Path,
    count: int,
    settings: TalkSettings,
    *,
    questions: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Fill `path` up to `count` conversations, or until the given questions are answered.

    Returns:
        conversations in the file.

    Raises:
        UsageError: for a model without a chat template, or a file that is not ours.
        EdgekitError: if nothing that the model says is usable.
    """
    source = SelfTalk(model, settings, questions)
    file = TalkFile(path, settings.batch)
    started = time.perf_counter()
    collect(source.batches(file.next), file, count, say)
    say(f"{source.new_tokens / (time.perf_counter() - started):.0f} tokens per second")
    return file.count


def _read_questions(path: Path) -> list[str]:
    questions = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not questions:
        raise UsageError(f"{path}: holds no question; write one on each line")
    return questions


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m edgekit.data.selftalk", allow_abbrev=False)
    parser.add_argument("bundle", type=Path, help="a converted chat model")
    parser.add_argument("-o", "--out", type=Path, required=True, help="JSONL file to fill")
    parser.add_argument("--count", type=int, default=1000, help="conversations to have in it")
    parser.add_argument("--questions", type=Path, help="answer these, one a line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="conversations side by side")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--engine", choices=("openvino", "onnx"))
    args = parser.parse_args(argv)
    return guarded("selftalk", lambda: _talked(args))


def _talked(args: argparse.Namespace) -> str:
    settings = TalkSettings(seed=args.seed, batch=args.batch, max_new_tokens=args.max_new_tokens)
    questions = None if args.questions is None else _read_questions(args.questions)
    model = load(args.bundle, engine=args.engine)
    total = talk(
        model,
        args.out,
        args.count,
        settings,
        questions=questions,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return f"{args.out}: {total} conversations"


if __name__ == "__main__":
    sys.exit(main())
