"""A decoder's graph with every shape fixed, for a device or a step that should find nothing out.

`fix_shapes` makes the graph of one call of `tokens`. At one token there is nothing to chunk, so the
recurrence becomes what it is, two products of vectors and one with the state:

    S' = e^g S + k v+^T      y = q S'

(`kernels/gla/reference.py`, `recurrent_gla`), and what is one row that counts needs no mask and no
order of rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from edgekit.errors import UnsupportedError, UsageError

__all__ = ["CHUNK", "fix_shapes"]

CHUNK = 64  # tokens: those that a graph reads without a loop
MASK, ORDER = "attention_mask", "beam_idx"


def fix_shapes(model: ov.Model, tokens: int) -> None:
    """Give every input, state and node of a decoder's graph one shape, in place.

    Inputs keep their names: `input_ids [1, tokens]`, `attention_mask [1, tokens]`, `beam_idx [1]`;
    a graph of one token has neither mask nor `beam_idx`.

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
    if tokens == 1:
        _drop_mask_and_order(model)
        _unchunk(model)
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


def _drop_mask_and_order(model: ov.Model) -> None:
    """Take out the inputs that say one thing only of one row of one token."""
    for parameter in model.get_parameters():
        names = parameter.output(0).get_names()
        if MASK in names:
            _redirect(parameter.output(0), op.constant(np.ones((1, 1), np.int64)).output(0))
        elif ORDER in names:
            for user in parameter.output(0).get_target_inputs():
                gather = user.get_node()
                _redirect(gather.output(0), gather.input_value(0))
        else:
            continue
        model.remove_parameter(parameter)


def _unchunk(model: ov.Model) -> None:
    """Replace each recurrence that the exporter named; those of older bundles stay as they are."""
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    for assign in model.get_sinks():
        name = assign.get_variable_id()
        if f"{name}.y" not in nodes:
            continue
        joined, *ends = (nodes[f"{name}.{part}"] for part in "yqkvg")
        y, after = _step(nodes[name].output(0), *(end.input_value(0) for end in ends))
        _redirect(joined.output(0), op.reshape(y, _shape(joined), False).output(0))
        assign.input(0).replace_source_output(after)


def _step(past: Any, q: Any, k: Any, v: Any, g: Any) -> tuple[Any, Any]:
    """`y [1, S, G, V]` and the state `[1, S, F, V]` after one token.

    Args:
        past: the state `[1, S, F, V]`, before it.
        q: features `[1, H, 1, F]`, H = S G.
        k: features `[1, S, 1, F]`.
        v: values and the columns after them, `[1, S, 1, V]`.
        g: log decay `[1, S, 1, F]`.
    """
    _, heads, rows, _ = past.get_shape()
    column = _ints([1, heads, rows, 1])
    kept = op.multiply(op.exp(op.reshape(g, column, False)), past)
    after = op.add(kept, op.multiply(op.reshape(k, column, False), v)).output(0)
    grouped = op.reshape(q, _ints([1, heads, -1, rows]), False)
    return op.matmul(grouped, after, False, False).output(0), after


def _shape(node: Any) -> Any:
    return _ints(list(node.get_output_shape(0)))


def _ints(values: Sequence[int]) -> Any:
    return op.constant(np.array(values, dtype=np.int64)).output(0)


def _redirect(port: Any, source: Any) -> None:
    """Let every user of `port` read `source`."""
    for user in port.get_target_inputs():
        user.replace_source_output(source)
