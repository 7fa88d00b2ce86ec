"""Rows of text, conversations and needles: an endless stream that is a function of its number.

Row i depends on the files, the length, the seed and i alone, so training resumes exactly where it
stopped and each process fetches its own part.
"""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.data.batch import Batch
from edgekit.data.documents import read_documents, times_given
from edgekit.data.needles import EVALUATION_SEED, KINDS, Sample, make_sample, needs_essay
from edgekit.data.packing import Row, Stream, as_row, stacked
from edgekit.data.tokens import ChatLoss, Tokens, completion, tokenise
from edgekit.errors import UsageError
from edgekit.runtime.text import Tokenizer

__all__ = ["Corpus", "DataFile", "Mixture", "NeedleShare", "read_corpus"]

Progress = Callable[[str, int, int], None]
BLOCK = 1000  # rows; each block of so many holds the same number of needles
ORDER, SLOTS, NEEDLE = range(3)  # one stream of random numbers for each purpose


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleShare:
    """How much synthetic retrieval there is among the rows.

    Attributes:
        share: of all rows, 0 to 1, in steps of 1 / BLOCK.
        kinds: of `edgekit.data.needles`; each needle draws one of them.
        lengths: tokens; each needle draws one of them.
        depths: where needles lie, 0 (the beginning) to 1; each draws one of them. None: evenly,
            as in evaluations.
        essay: the haystack of `niah-2` and `niah-3`.

    Raises:
        UsageError: for a value outside what is allowed.
    """

    share: float
    kinds: tuple[str, ...] = ("passkey", "niah-1")
    lengths: tuple[int, ...] = (256,)
    depths: tuple[float, ...] | None = None
    essay: str | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if not 0 <= self.share <= 1:
            raise UsageError(f"share {self.share} of needles given; allowed: 0 to 1")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise UsageError(f"needle kinds {self.kinds} given; allowed: {', '.join(KINDS)}")
        if not self.lengths:
            raise UsageError("no lengths of needles given; give one or more, in tokens")
        if self.depths is not None and not (self.depths and all(0 <= d <= 1 for d in self.depths)):
            raise UsageError(f"depths {self.depths} of needles given; allowed: one or more, 0 to 1")
        if self.essay is None and any(needs_essay(kind) for kind in self.kinds):
            raise UsageError("niah-2 and niah-3 hide their needle in an essay; give one")

    @property
    def per_block(self) -> int:
        """Needles among BLOCK rows."""
        return round(self.share * BLOCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """Where tokens come from.

    Attributes:
        name: of the file, or `datasets:ID[:SPLIT]`.
        sha256: hex digest of its contents.
        documents: texts and conversations in it.
        tokens: of them all, as this tokenizer counts.
        times: an epoch holds them.
    """

    name: str
    sha256: str
    documents: int
    tokens: int
    times: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Tokenised files, to be mixed once or, for several stages of training, more often.

    Attributes:
        files: where the tokens come from.
        documents: texts and conversations.
        tokenizer: of the model.
        eos: the id that ends a text.
    """

    files: tuple[DataFile, ...]
    documents: tuple[Tokens, ...]
    tokenizer: Tokenizer
    eos: int

    def mix(self, *, length: int, seed: int, needles: NeedleShare | None = None) -> "Mixture":
        """Rows of these documents and of needles.

        Args:
            length: tokens of a row.
            seed: of the order of documents and rows, and of needles; 0 or more.
            needles: synthetic retrieval among the rows.

        Raises:
            UsageError: for an argument outside its range, needles longer than a row, or no text
                where not all rows are needles.
        """
        return Mixture(self, length=length, seed=seed, needles=needles)


def read_corpus(
    files: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    eos: int,
    chat_loss: ChatLoss = "assistant",
    progress: Progress | None = None,
) -> Corpus:
    """Read and tokenise `files`.

    Args:
        files: `.txt`, `.md`, `.rst`, `.jsonl` or `datasets:ID[:SPLIT]`, each with `@N` at its end
            if an epoch is to hold it N times; none, if all rows are to be needles. See
            `edgekit.data.documents`.
        tokenizer: of the model; with a chat template if there are conversations.
        eos: the id that ends a text.
        chat_loss: `assistant` learns from the assistant's turns only, `all` from every token.
        progress: told name, number and count of each file before it is read.

    Raises:
        UsageError: for a file that is missing, empty, binary or malformed, naming file and line.
    """
    given = times_given(files)
    records: list[DataFile] = []
    documents: list[Tokens] = []
    convert = functools.partial(tokenise, tokenizer=tokenizer, eos=eos, chat_loss=chat_loss)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # tokenizers works without Python's lock
        for number, (file, times) in enumerate(given.items()):
            if progress is not None:
                progress(f"reading {Path(file).name}", number, len(given))
            origin = read_documents(file)
            found = list(pool.map(convert, origin.documents))
            documents += found * times
            records.append(
                DataFile(
                    name=origin.name,
                    sha256=origin.sha256,
                    documents=len(found),
                    tokens=sum(len(document.ids) for document in found),
                    times=times,
                )
            )
    return Corpus(files=tuple(records), documents=tuple(documents), tokenizer=tokenizer, eos=eos)


class Mixture:
    """An endless stream of rows; `Corpus.mix` makes it.

    Attributes:
        files: where the tokens come from.
    """

    def __init__(
        self, corpus: Corpus, *, length: int, seed: int, needles: NeedleShare | None
    ) -> None:
        """See `Corpus.mix`."""
        if length < 1:
            raise UsageError(f"length {length} given; allowed: 1 or more")
        if seed < 0:
            raise UsageError(f"seed {seed} given; allowed: 0 or more")
        share = NeedleShare(share=0.0) if needles is None else needles
        if share.per_block and max(share.lengths) > length:
            raise UsageError(
                f"needles of {max(share.lengths)} tokens given for rows of {length}; "
                f"allowed: lengths up to {length}"
            )
        self._stream = Stream(corpus.documents, length=length, seed=seed)
        if not self._stream.rows and share.per_block < BLOCK:
            raise UsageError("no text to train on; give --data FILE, or needles as all the rows")
        self.files = corpus.files
        self._tokenizer, self._eos = corpus.tokenizer, corpus.eos
        self._share, self._length, self._seed = share, length, seed
        if share.per_block:  # a length that is too short for a kind shows now, not in mid-run
            for kind, tokens in itertools.product(share.kinds, share.lengths):
                self._sample(kind, tokens, seed=0)

    @property
    def rows(self) -> int:
        """Rows of one epoch, needles left out."""
        return self._stream.rows

    @property
    def tokens(self) -> int:
        """Tokens of one epoch, needles left out."""
        return self._stream.tokens

    def batch(self, start: int, count: int) -> Batch:
        """Rows `start` to `start + count - 1`.

        Every row of text comes once in an epoch, in an order of that epoch.

        Raises:
            UsageError: if `start` is negative or `count` below 1.
        """
        if start < 0 or count < 1:
            raise UsageError(f"rows {start} and {count} more given; allowed: from 0, 1 or more")
        rows = [self._row(number) for number in range(start, start + count)]
        return stacked(rows, length=self._length, pad=self._eos)

    def _row(self, number: int) -> Row:
        block, place = divmod(number, BLOCK)
        per_block = self._share.per_block
        is_needle = _needle_slots(self._seed, block, per_block)
        if is_needle[place]:
            return self._needle(number)
        text = block * (BLOCK - per_block) + int(np.count_nonzero(~is_needle[:place]))
        epoch, place = divmod(text, self.rows)
        return self._stream.row(int(_epoch_order(self._seed, epoch, self.rows)[place]))

    def _needle(self, number: int) -> Row:
        random, share = np.random.default_rng([self._seed, NEEDLE, number]), self._share
        kind = share.kinds[int(random.integers(len(share.kinds)))]
        length = share.lengths[int(random.integers(len(share.lengths)))]
        seed, depth = int(random.integers(EVALUATION_SEED)), None
        if share.depths is not None:
            depth = share.depths[int(random.integers(len(share.depths)))]
        sample = self._sample(kind, length, seed=seed, depth=depth)
        return as_row(completion(sample.prompt, sample.answer, self._tokenizer, eos=self._eos))

    def _sample(self, kind: str, length: int, *, seed: int, depth: float | None = None) -> Sample:
        return make_sample(
            kind,
            length=length,
            seed=seed,
            depth=depth,
            encode=self._tokenizer.encode_prompt,
            essay=self._share.essay,
            answer_room=1,  # for eos
        )


@functools.lru_cache(maxsize=4)
def _needle_slots(seed: int, block: int, count: int) -> npt.NDArray[np.bool_]:
    """Which rows of a block are needles, bool `[BLOCK]`."""
    order = np.random.default_rng([seed, SLOTS, block]).permutation(BLOCK)
    return order < count


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    """The order of an epoch's rows, int64 `[rows]`."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(rows)
