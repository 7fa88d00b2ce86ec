"""Two graphs of one decoder: the same states, which go from the one to the other as they are."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from edgekit.errors import UnsupportedError
from edgekit.runtime.engine import Array, EngineRequest, Floats, Integers, call_shape

__all__ = ["StaticRequest", "SteppedRequest"]


class _TwoGraphs:
    """A request of a graph that reads a prompt and one of a graph that reads a token.

    The states are with one of the two; an empty one needs nothing to be carried.
    """

    def __init__(self, prompt: EngineRequest, step: EngineRequest) -> None:
        self._prompt, self._one, self._holder = prompt, step, prompt
        self._empty = True

    @property
    def image_mass(self) -> Floats | None:
        """What the last call's graph said."""
        return self._holder.image_mass

    def _run(self, request: EngineRequest, feeds: Mapping[str, Array]) -> Floats:
        """Call one of the two, with the states where they are needed."""
        if request is not self._holder:
            if not self._empty:
                request.write_states(self._holder.read_states())
            self._holder = request
        logits = request.infer(feeds)
        self._empty = False
        return logits

    def reset(self, batch: int) -> None:
        """Forget everything."""
        self._prompt.reset(batch)
        self._one.reset(1)
        self._holder, self._empty = self._prompt, True

    def read_states(self) -> dict[str, Array]:
        """Copies of the states."""
        return self._holder.read_states()

    def write_states(self, states: Mapping[str, Array]) -> None:
        """Continue from `states`, which are taken to be of a text."""
        self._holder = self._prompt
        self._prompt.write_states(states)
        self._empty = False

    def use_adapters(self, lowered: Any) -> None:
        """Graphs of fixed shapes have no slots."""

    def embed(self, ids: Integers) -> Floats:
        """Rows of the token table."""
        return self._prompt.embed(ids)


class SteppedRequest(_TwoGraphs):
    """The bundle's own graph for whatever comes, and one of fixed shapes for one row's token."""

    def __init__(self, prompt: EngineRequest, step: EngineRequest, batch: int) -> None:
        """Take a request for `batch` rows and one for a token of one row."""
        super().__init__(prompt, step)
        self._batch = batch

    def infer(self, feeds: Mapping[str, Array]) -> Floats:
        """Run the graph that fits the call; a token that does not count is not the step's."""
        single = call_shape(feeds) == (1, 1) and feeds["attention_mask"].all()
        return self._run(self._one if single else self._prompt, feeds)

    def reset(self, batch: int) -> None:
        """Forget everything."""
        super().reset(batch)
        self._batch = batch

    def reorder(self, rows: Integers) -> None:
        """Remember the order; one row that stays needs none."""
        if len(rows) == self._batch == 1:
            return
        if self._holder is not self._prompt:
            self.write_states(self.read_states())
        self._prompt.reorder(rows)
        self._batch = len(rows)

    def write_states(self, states: Mapping[str, Array]) -> None:
        """Continue from `states`."""
        super().write_states(states)
        self._batch = len(next(iter(states.values())))


class StaticRequest(_TwoGraphs):
    """A graph of a chunk and one of a step, both of batch 1, as an NPU needs them.

    An empty session's first chunk begins with padding (`attention_mask` 0), which leaves an empty
    state empty; later on what fills no chunk is read token by token.
    """

    def __init__(
        self, chunk: EngineRequest, step: EngineRequest, *, tokens: int, batch: int
    ) -> None:
        """Take two requests of batch 1, the first of a graph that reads `tokens` in a call.

        Raises:
            UnsupportedError: if `batch` is not 1.
        """
        _check_batch(batch)
        super().__init__(chunk, step)
        self._tokens = tokens

    def infer(self, feeds: Mapping[str, Array]) -> Floats:
        """Run whole chunks, then single steps; the logits are of the last position, `[1, 1, V]`."""
        for request, part in self._parts(feeds):
            logits = self._run(request, part)
        return logits

    def _parts(
        self, feeds: Mapping[str, Array]
    ) -> Iterator[tuple[EngineRequest, dict[str, Array]]]:
        """Calls of fixed shapes that read `feeds`, in order."""
        length, start = call_shape(feeds)[1], 0
        short = length % self._tokens
        if self._empty and length > 1 and short:
            padded = {n: _padded(x[:, :short], self._tokens) for n, x in feeds.items()}
            yield self._prompt, padded
            start = short
        while length - start >= self._tokens:
            end = start + self._tokens
            yield self._prompt, {n: _columns(x, start, end, length) for n, x in feeds.items()}
            start = end
        for at in range(start, length):
            yield self._one, {n: _columns(x, at, at + 1, length) for n, x in feeds.items()}

    def reset(self, batch: int) -> None:
        """Forget everything.

        Raises:
            UnsupportedError: if `batch` is not 1.
        """
        _check_batch(batch)
        super().reset(1)

    def reorder(self, rows: Integers) -> None:
        """One row can only stay where it is.

        Raises:
            UnsupportedError: if there are to be more.
        """
        _check_batch(len(rows))


def _check_batch(batch: int) -> None:
    if batch != 1:
        raise UnsupportedError(f"batch {batch} asked for; graphs of fixed shapes have batch 1")


def _padded(x: Array, tokens: int) -> Array:
    """`x [1, t]` behind zeros, `[1, tokens]`."""
    return np.pad(x, ((0, 0), (tokens - x.shape[1], 0)))


def _columns(x: Array, start: int, end: int, length: int) -> Array:
    """Columns of the call's `length` last ones, as a mask has those of the past before them."""
    past = x.shape[1] - length
    return np.ascontiguousarray(x[:, past + start : past + end])
