"""Beam search as transformers' `num_beams` does it (early_stopping False, length_penalty 1).

Among finished texts the one with the highest mean log-probability wins. The search ends when no
running beam, at its present mean, is above the worst of the `num_beams` finished ones; until then
it goes on to `max_new_tokens`. K beams, V vocabulary.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from edgekit.runtime.engine import Floats, Integers
from edgekit.runtime.pictures import Pictures
from edgekit.runtime.sampling import GenerationOptions, penalise
from edgekit.runtime.session import Session

__all__ = ["BeamText", "beam_search"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamText:
    """What beam search found.

    Attributes:
        tokens: the new tokens, the one that finished them left out.
        ending: why they are no more.
        ttft_seconds: from the start until the prompt was read and the first step taken.
    """

    tokens: list[int]
    ending: Literal["end of text", "max_new_tokens", "context full"]
    ttft_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Beam:
    """A continuation, the row of the session that holds its state, and its log-probability."""

    tokens: tuple[int, ...]
    row: int
    score: float


@dataclass(slots=True)
class _Search:
    """Running beams, best first, and finished ones by mean log-probability, best first."""

    width: int
    running: list[_Beam]
    finished: list[tuple[float, _Beam]] = field(default_factory=list)

    def finish(self, beam: _Beam) -> None:
        self.finished.append((beam.score / len(beam.tokens), beam))
        self.finished.sort(key=lambda item: -item[0])  # stable: the earlier of equals stays ahead
        del self.finished[self.width :]

    def can_improve(self) -> bool:
        """Whether the best running beam may yet beat the worst of a full set of finished ones."""
        if len(self.finished) < self.width:
            return True
        best = self.running[0]
        return best.score / len(best.tokens) > self.finished[-1][0]


def beam_search(
    session: Session,
    prompt: Integers,
    options: GenerationOptions,
    ends: tuple[int, ...],
    pictures: Pictures | None = None,
) -> BeamText:
    """The best continuation of a prompt.

    Args:
        session: empty, with a batch of 1; afterwards its state is that of the last step.
        prompt: ids `[T]`.
        options: `num_beams`, `max_new_tokens` and `repetition_penalty` are read.
        ends: tokens that finish a text.
        pictures: what the prompt's image tokens stand for.

    Raises:
        UsageError: if the prompt does not fit the model's context.
    """
    started, ttft = time.perf_counter(), 0.0
    logits = session.next_logits(prompt, None, pictures)
    search = _Search(options.num_beams, [_Beam(tokens=(), row=0, score=0.0)])
    limit = options.max_new_tokens
    if session.room is not None:
        limit = min(limit, session.room + 1)
    for step in range(limit):
        _advance(
            search, _log_probabilities(logits, search, prompt, options), ends, step + 1 == limit
        )
        ttft = ttft or time.perf_counter() - started
        if step + 1 == limit or not search.can_improve():
            break
        session.reorder([beam.row for beam in search.running])
        logits = session.next_logits([[beam.tokens[-1]] for beam in search.running])
    best = search.finished[0][1].tokens
    if best[-1] in ends:
        return BeamText(tokens=list(best[:-1]), ending="end of text", ttft_seconds=ttft)
    full = limit < options.max_new_tokens
    return BeamText(
        tokens=list(best),
        ending="context full" if full else "max_new_tokens",
        ttft_seconds=ttft,
    )


def _log_probabilities(
    logits: Floats, search: _Search, prompt: Integers, options: GenerationOptions
) -> Floats:
    """Log-probabilities `[K, V]`; as in transformers, repeats are penalised after the softmax."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    scores: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    if options.repetition_penalty == 1.0:
        return scores
    seen = np.zeros(scores.shape, dtype=bool)
    seen[:, prompt] = True
    for row, beam in enumerate(search.running):
        seen[row, list(beam.tokens)] = True
    return penalise(scores, seen, options.repetition_penalty)


def _advance(search: _Search, scores: Floats, ends: tuple[int, ...], last: bool) -> None:
    """Extend every beam by its likeliest tokens; what ends goes to the finished ones."""
    total = scores + np.array([[beam.score] for beam in search.running], dtype=np.float32)
    vocab = total.shape[1]
    # So many candidates that `width` of them go on even if each beam could also end in each way.
    count = min(max(2, 1 + len(ends)) * search.width, total.size)
    order = np.argpartition(-total, count - 1, axis=None)[:count]
    order = order[np.argsort(-total.ravel()[order], kind="stable")]
    extended = [
        _Beam(
            tokens=(*search.running[at // vocab].tokens, int(at % vocab)),
            row=int(at // vocab),
            score=float(total.ravel()[at]),
        )
        for at in order
    ]
    ending = [last or beam.tokens[-1] in ends for beam in extended]
    # Only a candidate among the best `width` may finish.
    for beam, ended in list(zip(extended, ending, strict=True))[: search.width]:
        if ended:
            search.finish(beam)
    search.running = [b for b, ended in zip(extended, ending, strict=True) if not ended][
        : search.width
    ]
