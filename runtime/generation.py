"""The token loop: prompts in, pieces of text out, for one prompt or a left-padded batch of them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgekit.errors import UsageError
from edgekit.runtime.beam import beam_search
from edgekit.runtime.engine import Floats, Integers
from edgekit.runtime.pictures import Pictures
from edgekit.runtime.sampling import GenerationOptions, Sampler
from edgekit.runtime.session import Session
from edgekit.runtime.text import Detokenizer, StopFilter, Tokenizer

__all__ = ["Generation", "GenerationStats", "ScoredPiece", "left_padded"]

Ending = Literal["end of text", "stop string", "max_new_tokens", "context full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationStats:
    """What a generation took; the consumer's own time between pieces is not counted.

    Attributes:
        prompt_tokens: over all prompts, padding left out.
        new_tokens: over all rows, the ones that ended them included.
        ttft_seconds: from the start to the first token.
        decode_seconds: from the first token to the last.
        endings: why each row ended.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_seconds: float
    decode_seconds: float
    endings: tuple[Ending, ...]

    @property
    def tokens_per_second(self) -> float:
        """Decode rate over all rows, the first tokens left out; 0 if there was only one each."""
        later = self.new_tokens - len(self.endings)
        return later / self.decode_seconds if later and self.decode_seconds else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPiece:
    """A piece of text, and how far the model looked at the pictures when it wrote it.

    Attributes:
        text: the piece.
        image_mass: the share of their attention that heads spent on pictures, 0 to 1, the mean over
            the tokens since the piece before; None: there were no pictures, or the bundle does not
            say.
    """

    text: str
    image_mass: float | None


class _Row:
    """One sequence of a batch: chooses its tokens, turns them into text, knows when it ended."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: GenerationOptions,
        sampler: Sampler,
        ends: Sequence[int],
    ) -> None:
        self._options, self._sampler, self._ends = options, sampler, ends
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopFilter(options.stop)
        self._masses: list[float] = []  # of the tokens since the last piece
        self._mean: float | None = None
        self.count = 0
        self.last = 0
        self.ending: Ending | None = None

    def advance(self, logits: Floats, room: int | None, mass: float | None) -> ScoredPiece:
        """Choose the next token from `logits [V]` and return the text that it completes, or "".

        `mass` is the share of attention on pictures with which these logits came.
        """
        text = self._chosen(logits, room)
        if mass is not None and self.ending != "end of text":
            self._masses.append(mass)
            self._mean = sum(self._masses) / len(self._masses)
        if text:
            self._masses = []
        return ScoredPiece(text=text, image_mass=self._mean)

    def _chosen(self, logits: Floats, room: int | None) -> str:
        self.last = self._sampler(logits)
        self.count += 1
        if self.last in self._ends:
            self.ending = "end of text"
            return self._flushed("")
        shown = self._stop.push(self._detokenizer.push(self.last))
        if self._stop.stopped:
            self.ending = "stop string"
            return shown
        if self.count == self._options.max_new_tokens:
            self.ending = "max_new_tokens"
        elif room == 0:
            self.ending = "context full"
        return shown if self.ending is None else self._flushed(shown)

    def _flushed(self, shown: str) -> str:
        shown += self._stop.push(self._detokenizer.finish())
        return shown + self._stop.finish()


class Generation:
    """One call of `generate` or `stream`; `stats` is there when it ended."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompts: Sequence[Integers],
        options: GenerationOptions,
        ends: tuple[int, ...],
        vocab: int,
        *,
        seen: Sequence[Integers] | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        """Prepare; nothing is computed yet.

        Args:
            session: with one row per prompt; what it has read already comes before the prompts.
            tokenizer: of the same bundle.
            prompts: ids `[T]` each, not read yet.
            options: how to continue.
            ends: token ids that end a text, unless `options.ignore_eos`.
            vocab: V, entries of the logits.
            seen: ids of each row that count for the repetition penalty; None: those of `prompts`.
            pictures: what the image tokens of all prompts stand for.

        Raises:
            UsageError: if a prompt is empty.
        """
        if not all(len(prompt) for prompt in prompts):
            raise UsageError("an empty prompt given; give at least one token")
        self._session, self._tokenizer, self._options = session, tokenizer, options
        self._prompts, self._pictures = prompts, pictures
        self._ends = () if options.ignore_eos else ends
        self._rows = [
            _Row(tokenizer, options, Sampler(options, ids, vocab, row), self._ends)
            for row, ids in enumerate(prompts if seen is None else seen)
        ]
        self._seconds = 0.0
        self._ttft = 0.0
        self.stats: GenerationStats | None = None

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Row number and piece of text, as they come; empty pieces are left out."""
        return ((row, piece.text) for row, piece in self.scored_pieces())

    def scored_pieces(self) -> Iterator[tuple[int, ScoredPiece]]:
        """The same with what each piece has of the pictures."""
        running = list(range(len(self._rows)))
        started = time.perf_counter()
        logits = self._session.next_logits(*left_padded(self._prompts), self._pictures)
        while running:
            shown = [(i, self._advance(at, i, logits)) for at, i in enumerate(running)]
            self._ttft = self._ttft or time.perf_counter() - started
            self._seconds += time.perf_counter() - started
            yield from ((i, piece) for i, piece in shown if piece.text)
            started = time.perf_counter()
            running = self._drop_ended(running)
            if running:
                logits = self._session.next_logits([[self._rows[i].last] for i in running])
        self._finish(
            sum(row.count for row in self._rows),
            tuple(row.ending for row in self._rows if row.ending),
        )

    def _advance(self, at: int, row: int, logits: Floats) -> ScoredPiece:
        """Let `row`, which is row `at` of the session now, choose from `logits [B, V]`."""
        rooms = self._session.rooms
        masses = None if self._pictures is None else self._session.image_mass
        return self._rows[row].advance(
            logits[at],
            None if rooms is None else rooms[at],
            None if masses is None else float(masses[at]),
        )

    def _drop_ended(self, running: list[int]) -> list[int]:
        """Shrink the batch to the rows that go on."""
        kept = [at for at, i in enumerate(running) if self._rows[i].ending is None]
        if kept and len(kept) < len(running):
            self._session.reorder(kept)
        return [running[at] for at in kept]

    def best_beam(self) -> str:
        """The text that beam search finds for the only prompt."""
        started = time.perf_counter()
        found = beam_search(
            self._session, self._prompts[0], self._options, self._ends, self._pictures
        )
        self._seconds, self._ttft = time.perf_counter() - started, found.ttft_seconds
        stop = StopFilter(self._options.stop)
        text = stop.push(self._tokenizer.decode(found.tokens))
        ended = found.ending == "end of text"  # by a token that counts though it is not shown
        ending: Ending = "stop string" if stop.stopped else found.ending
        self._finish(len(found.tokens) + ended, (ending,))
        return text if stop.stopped else text + stop.finish()

    def _finish(self, new_tokens: int, endings: tuple[Ending, ...]) -> None:
        self.stats = GenerationStats(
            prompt_tokens=sum(len(prompt) for prompt in self._prompts),
            new_tokens=new_tokens,
            ttft_seconds=self._ttft,
            decode_seconds=self._seconds - self._ttft,
            endings=endings,
        )


def left_padded(prompts: Sequence[Integers]) -> tuple[Integers, Integers]:
    """Prompts side by side, ending together: ids `[B, T]`, and a mask that is 0 on padding."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
