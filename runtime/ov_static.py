"""A decoder whose every shape is fixed, as an NPU needs it: one graph of a chunk, one of a step.

Both have batch 1 and the same states, which go from the one to the other as they are. An empty
session's first chunk begins with padding (`attention_mask` 0), which leaves an empty state empty;
later on what fills no chunk is read token by token.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov

from edgekit.errors import UnsupportedError, UsageError
from edgekit.runtime.engine import Array, EngineRequest, Floats, Integers, call_shape

__all__ = ["CHUNK", "StaticRequest", "fix_shapes"]

CHUNK = 64  # tokens: those that a graph reads without a loop


class StaticRequest:
    """A request of the chunk's graph and one of the step's; the states are with one of them."""

    def __init__(
        self, chunk: EngineRequest, step: EngineRequest, *, tokens: int, batch: int
    ) -> None:
        """Take two requests of batch 1, the first of a graph that reads `tokens` in a call.

        Raises:
            UnsupportedError: if `batch` is not 1.
        """
        _check_batch(batch)
        self._chunk, self._step, self._tokens = chunk, step, tokens
        self._holder, self._empty = chunk, True
        self.image_mass: Floats | None = None

    def infer(self, feeds: Mapping[str, Array]) -> Floats:
        """Run whole chunks, then single steps; the logits are of the last position, `[1, 1, V]`."""
        for request, part in self._parts(feeds):
            if request is not self._holder:
                request.write_states(self._holder.read_states())
                self._holder = request
            logits = request.infer(part)
        self._empty = False
        return logits

    def _parts(
        self, feeds: Mapping[str, Array]
    ) -> Iterator[tuple[EngineRequest, dict[str, Array]]]:
        """Calls of fixed shapes that read `feeds`, in order."""
        length, start = call_shape(feeds)[1], 0
        short = length % self._tokens
        if self._empty and length > 1 and short:
            padded = {n: _padded(x[:, :short], self._tokens) for n, x in feeds.items()}
            yield self._chunk, padded
            start = short
        while length - start >= self._tokens:
            end = start + self._tokens
            yield self._chunk, {n: _columns(x, start, end, length) for n, x in feeds.items()}
            start = end
        for at in range(start, length):
            yield self._step, {n: _columns(x, at, at + 1, length) for n, x in feeds.items()}

    def reset(self, batch: int) -> None:
        """Forget everything.

        Raises:
            UnsupportedError: if `batch` is not 1.
        """
        _check_batch(batch)
        for request in (self._chunk, self._step):
            request.reset(1)
        self._holder, self._empty = self._chunk, True

    def reorder(self, rows: Integers) -> None:
        """One row can only stay where it is.

        Raises:
            UnsupportedError: if there are to be more.
        """
        _check_batch(len(rows))

    def read_states(self) -> dict[str, Array]:
        """Copies of the states."""
        return self._holder.read_states()

    def write_states(self, states: Mapping[str, Array]) -> None:
        """Continue from `states`, which are taken to be of a text."""
        self._holder.write_states(states)
        self._empty = False

    def use_adapters(self, lowered: Any) -> None:
        """Graphs of fixed shapes have no slots."""

    def embed(self, ids: Integers) -> Floats:
        """Rows of the token table."""
        return self._chunk.embed(ids)


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


def fix_shapes(model: ov.Model, tokens: int) -> None:
    """Give every input, state and node of a decoder's graph one shape, in place.

    Inputs keep their names: `input_ids [1, tokens]`, `attention_mask [1, tokens]`, `beam_idx [1]`.

    Args:
        model: as `build_openvino` makes it or a bundle has it.
        tokens: of one call, 1 to 64: those of one chunk, so that no loop over chunks remains.

    Raises:
        UsageError: for another number of tokens.
        UnsupportedError: if a state grows with the text, or takes adapters of any rank.
    """
    if not 1 <= tokens <= CHUNK:
        raise UsageError(f"{tokens} tokens a call given; allowed: 1 to {CHUNK}")
    states = {v.info.variable_id: v.info.data_shape for v in model.get_variables()}
    for name, shape in states.items():
        if name.startswith("adapter.") or any(size.is_dynamic for size in list(shape)[1:]):
            raise UnsupportedError(
                f"state {name} {shape} has no fixed size; allowed: layers of lawcat or lolcats, "
                "without adapter slots"
            )
    inputs = {port: port.get_partial_shape() for port in model.inputs}
    model.reshape(
        {port: _filled(shape, (1, tokens)) for port, shape in inputs.items()},
        {name: _filled(shape, (1,)) for name, shape in states.items()},
    )
    for node in model.get_ops():
        if node.get_type_name() == "Loop":
            _inline(node)
    model.validate_nodes_and_infer_types()


def _filled(shape: ov.PartialShape, sizes: Sequence[int]) -> list[int]:
    """`shape` with `sizes` for its open entries, in their order: the batch, then the tokens."""
    given = iter(sizes)
    return [next(given) if size.is_dynamic else size.get_length() for size in shape]


def _inline(loop: Any) -> None:
    """Put the body of a loop of one round where the loop is; its slices are whole inputs then."""
    assert loop.get_num_iterations() == 1
    body = loop.get_function()
    parameters, results = body.get_parameters(), body.get_results()
    for entry in loop.get_input_descriptions():
        parameter = parameters[entry.body_parameter_index]
        _redirect(parameter.output(0), loop.input_value(entry.input_index))
    for entry in loop.get_output_descriptions():
        result = results[entry.body_value_index]
        _redirect(loop.output(entry.output_index), result.input_value(0))


def _redirect(port: Any, source: Any) -> None:
    """Let every user of `port` read `source`."""
    for user in port.get_target_inputs():
        user.replace_source_output(source)
