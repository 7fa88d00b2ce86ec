"""Retrieval from long texts: does a model find the needle (`edgekit.data.needles`) by itself?

Every sample is answered by greedy generation, as RULER does it (arXiv 2404.06654): a needle task is
right where the answer contains the value, whatever its case; a passkey where the first number of
the answer is the key. Samples of one length are spread evenly over a grid of depths.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.data.needles import EVALUATION_SEED, KINDS, Sample, make_sample, needs_essay
from edgekit.errors import UsageError
from edgekit.eval.cells import Cell, summed
from edgekit.eval.greedy import greedy_answers
from edgekit.eval.machine import Machine, this_machine
from edgekit.eval.reader import Reader
from edgekit.eval.score import is_right
from edgekit.eval.windows import Progress
from edgekit.journal import Journal, Record

__all__ = ["Retrieval", "RetrievalOptions", "retrieval"]

NEW_TOKENS = {"passkey": 16, "niah-1": 128, "niah-2": 128, "niah-3": 128}  # RULER: 128
BATCH_TOKENS = 16384  # tokens of the prompts that are answered side by side
LARGEST_BATCH = 16
SEED_STEP = 10**6  # samples of one seed never meet those of the next


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalOptions:
    """What to measure.

    Attributes:
        task: one of `edgekit.data.needles.KINDS`.
        lengths: tokens of a prompt and `new_tokens` together, one cell each.
        samples: of each length; one number stands for all lengths.
        depths: how many depths from 0 to 1 the samples are spread over, the first few of them too;
            1 means the middle.
        max_new_tokens: of an answer, within the length; None: 16 for a passkey, else 128.
        seed: another one gives other samples.
        batch: prompts answered side by side; None: as many as hold 16384 tokens, at most 16.
        give_up: leave a length whose first so many samples are all wrong; None: never. Its
            interval is that of these samples.
    """

    task: str
    lengths: tuple[int, ...] = (1024,)
    samples: tuple[int, ...] = (100,)
    depths: int = 10
    max_new_tokens: int | None = None
    seed: int = 0
    batch: int | None = None
    give_up: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the option.
        """
        if self.task not in KINDS:
            raise UsageError(f"task {self.task!r} given; allowed: {', '.join(KINDS)}")
        if len(self.samples) not in (1, len(self.lengths)):
            raise UsageError(
                f"{len(self.samples)} numbers of samples given for {len(self.lengths)} lengths; "
                "allowed: one for all, or one for each"
            )
        counts = {"lengths": min(self.lengths, default=0), "samples": min(self.samples)}
        counts |= {"depths": self.depths, "max-new-tokens": self.new_tokens}
        counts |= {"batch": 1 if self.batch is None else self.batch}
        counts |= {"give-up": 1 if self.give_up is None else self.give_up}
        for name, value in counts.items():
            if value < 1:
                raise UsageError(f"{name} {value} given; allowed: 1 or more")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} given; allowed: 0 or more")

    @property
    def new_tokens(self) -> int:
        """Tokens that an answer may have."""
        return NEW_TOKENS[self.task] if self.max_new_tokens is None else self.max_new_tokens

    def depth(self, sample: int) -> float:
        """Where sample number `sample` hides its needle."""
        if self.depths == 1:
            return 0.5
        return sample * _stride(self.depths) % self.depths / (self.depths - 1)

    def count(self, length: int) -> int:
        """Samples of `length`."""
        if len(self.samples) == 1:
            return self.samples[0]
        return self.samples[self.lengths.index(length)]

    def batches(self, length: int, samples: Sequence[int]) -> list[list[int]]:
        """Some samples of `length` as they are answered side by side.

        A batch ends where `give_up` looks back, so that its size says nothing about the figures.
        """
        rows = self.batch or max(1, min(LARGEST_BATCH, BATCH_TOKENS // length))
        border = self.give_up or 0
        parts = [i for i in samples if i < border], [i for i in samples if i >= border]
        return [part[i : i + rows] for part in parts for i in range(0, len(part), rows)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrieval:
    """The result.

    Attributes:
        settings: what every sample depends on, and what a journal must share to be gone on with.
        cells: one per length, in the order asked for.
        notes: what a reader of the figures must know, one sentence each.
        machine: where the last samples were answered.
    """

    model: str
    task: str
    settings: dict[str, Any]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    machine: Machine


def retrieval(
    reader: Reader,
    options: RetrievalOptions,
    *,
    haystack: str | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Retrieval:
    """Answer and score every sample that the journal does not hold yet.

    Args:
        reader: opened with logits="last".
        options: what to measure; lengths and samples may be added to a journal later.
        haystack: the essay of `niah-2` and `niah-3`.
        journal: a file that every scored sample is written to; None: nothing is kept.
        progress: called with a step's name, its number and the count of steps.

    Raises:
        UsageError: for a length that is too short for its question, a missing haystack, or a
            journal of other settings.
    """
    if needs_essay(options.task) and haystack is None:
        raise UsageError(f"task {options.task} needs an essay; give a text file with --haystack")
    essay = haystack if needs_essay(options.task) else None
    run = _Run(reader=reader, options=options, essay=essay)
    kept = Journal(journal, run.settings)
    batches = run.missing(kept.records)
    for number, (length, samples) in enumerate(batches):
        if run.hopeless(length, kept.records):
            continue
        if progress is not None:
            progress(f"{options.task} at {length} tokens", number, len(batches))
        for record in run.answered(length, samples):
            kept.append(record)
    cells = tuple(run.cell(length, kept.records) for length in options.lengths)
    return Retrieval(
        model=reader.name,
        task=options.task,
        settings=run.settings,
        cells=cells,
        notes=() if essay is None else tuple(_notes(cells)),
        machine=this_machine(reader),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One measurement: which samples there are, and what the model says to them."""

    reader: Reader
    options: RetrievalOptions
    essay: str | None

    @property
    def settings(self) -> dict[str, Any]:
        essay = None if self.essay is None else hashlib.sha256(self.essay.encode()).hexdigest()
        return {
            "task": self.options.task,
            "model": self.reader.identity,
            "engine": self.reader.engine,
            "device": self.reader.device,
            "haystack_sha256": essay,
            "depths": self.options.depths,
            "max_new_tokens": self.options.new_tokens,
            "seed": self.options.seed,
        }

    def missing(self, records: Sequence[Record]) -> list[tuple[int, list[int]]]:
        """Length and sample numbers of every batch that is still to be answered."""
        there = {(record["length"], record["sample"]) for record in records}
        batches = []
        for length in self.options.lengths:
            if self._refusal(length) is not None:
                continue
            numbers = range(self.options.count(length))
            left = [i for i in numbers if (length, i) not in there]
            if left:
                self._sample(length, left[0])  # a length that is too short is refused at once
            batches += [(length, batch) for batch in self.options.batches(length, left)]
        return batches

    def hopeless(self, length: int, records: Sequence[Record]) -> bool:
        """Whether the first samples of `length` were all wrong, and it is to be left at that."""
        first = range(self.options.give_up or 0)
        found = [r["correct"] for r in records if r["length"] == length and r["sample"] in first]
        return bool(first) and len(found) == len(first) and not any(found)

    def answered(self, length: int, numbers: Sequence[int]) -> list[Record]:
        """The records of some samples, answered side by side."""
        samples = [self._sample(length, number) for number in numbers]
        prompts = [self.reader.tokenizer.encode_prompt(sample.prompt) for sample in samples]
        started = time.perf_counter()
        outputs = greedy_answers(
            self.reader,
            prompts,
            max_new_tokens=self.options.new_tokens,
            decided=lambda row, text: self._verdict(samples[row], text, ended=False) is not None,
        )
        seconds = (time.perf_counter() - started) / len(samples)
        return [
            {
                "task": self.options.task,
                "length": length,
                "sample": number,
                "depth": sample.depth,
                "tokens": len(prompt),
                "laps": sample.laps,
                "answer": sample.answer.strip(),
                "output": output,
                "correct": self._verdict(sample, output, ended=True),
                "seconds": round(seconds, 4),
            }
            for number, sample, prompt, output in zip(
                numbers, samples, prompts, outputs, strict=True
            )
        ]

    def cell(self, length: int, records: Sequence[Record]) -> Cell:
        """What the records say about one length."""
        refusal = self._refusal(length)
        if refusal is not None:
            return Cell(length=length, refused=refusal)
        wanted = range(self.options.count(length))
        if self.hopeless(length, records):
            wanted = range(min(len(wanted), self.options.give_up or 0))
        return summed(
            length, [r for r in records if r["length"] == length and r["sample"] in wanted]
        )

    def _sample(self, length: int, number: int) -> Sample:
        return make_sample(
            self.options.task,
            length=length,
            seed=EVALUATION_SEED + self.options.seed * SEED_STEP + number,
            depth=self.options.depth(number),
            encode=self.reader.tokenizer.encode_prompt,
            essay=self.essay,
            answer_room=self.options.new_tokens,
        )

    def _verdict(self, sample: Sample, text: str, *, ended: bool) -> bool | None:
        return is_right(self.options.task, sample.answer, text, ended=ended)

    def _refusal(self, length: int) -> str | None:
        limit = self.reader.limit
        if limit is None or length <= limit:
            return None
        return f"over the context limit of {limit} tokens"


def _stride(depths: int) -> int:
    """A step through the depths, far at each, that comes to all of them."""
    golden = round(depths * 0.618)
    return next(step for step in itertools.count(max(golden, 1)) if math.gcd(step, depths) == 1)


def _notes(cells: Sequence[Cell]) -> Iterator[str]:
    for cell in cells:
        if cell.laps > 1:
            yield (
                f"length {cell.length}: the haystack is shorter than the text, which repeats it "
                f"up to {cell.laps} times"
            )
