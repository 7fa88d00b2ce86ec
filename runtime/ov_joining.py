"""Products of one vector with several matrices become one product with their rows stacked.

A product of a single row is a matter of reading the matrix, and starting one costs as long as
reading a small matrix does; q, k and v, or gate and up, read the same vector. The numbers stay the
same: each output is still the sum of its own row.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

__all__ = ["join_products"]

ELEMENTWISE = {"Multiply": op.multiply, "Subtract": op.subtract}


def join_products(model: ov.Model) -> None:
    """Join, in place, the MatMuls that multiply the same value by constant matrices `[N, K]`.

    Matrices are joined if they are stored alike: the same types, groups and steps of decompression.
    """
    users: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for node in model.get_ordered_ops():
        if _is_product(node):
            source = node.input_value(0)
            users[source.get_node().get_name(), source.get_index()].append(node)
    for products in users.values():
        alike: dict[Any, list[Any]] = defaultdict(list)
        for product in products:
            alike[_form(product.input_value(1).get_node())].append(product)
        for form, group in alike.items():
            if form is not None and len(group) > 1:
                _join(group)
    model.validate_nodes_and_infer_types()


def _is_product(node: Any) -> bool:
    if node.get_type_name() != "MatMul":
        return False
    transposed = node.get_attributes()
    return transposed["transpose_b"] and not transposed["transpose_a"]


def _form(node: Any) -> Any:
    """How a matrix is stored, but for its number of rows; None: it is not constant."""
    kind, shape = node.get_type_name(), node.get_output_partial_shape(0)
    if shape.is_dynamic or not len(shape):
        return None
    if kind == "Constant":
        return kind, str(node.get_output_element_type(0)), *list(shape.to_shape())[1:]
    if kind == "Reshape":
        return kind, _form(node.input_value(0).get_node())
    if kind == "Convert":
        return kind, str(node.get_output_element_type(0)), _form(node.input_value(0).get_node())
    if kind in ELEMENTWISE:
        return kind, *(_form(node.input_value(i).get_node()) for i in (0, 1))
    return None


def _join(products: Sequence[Any]) -> None:
    """Put one product and a split of what it gives where `products` are."""
    matrices = [product.input_value(1).get_node() for product in products]
    rows = [matrix.get_output_shape(0)[0] for matrix in matrices]
    joined = op.matmul(products[0].input_value(0), _stacked(matrices), False, True)
    joined.set_friendly_name("+".join(product.get_friendly_name() for product in products))
    split = op.variadic_split(joined, _ints(-1), _ints(rows))
    for product, part in zip(products, split.outputs(), strict=True):
        for user in product.output(0).get_target_inputs():
            user.replace_source_output(part)


def _stacked(nodes: Sequence[Any]) -> Any:
    """The same steps as each of `nodes`, over the rows of all."""
    first = nodes[0]
    kind = first.get_type_name()
    if kind == "Constant":
        return _stacked_constants(nodes)
    below = [
        _stacked([node.input_value(i).get_node() for node in nodes])
        for i in range(2 if kind in ELEMENTWISE else 1)
    ]
    if kind in ELEMENTWISE:
        return ELEMENTWISE[kind](*below)
    if kind == "Convert":
        return op.convert(*below, first.get_output_element_type(0))
    rows = sum(node.get_output_shape(0)[0] for node in nodes)
    return op.reshape(*below, _ints([rows, *list(first.get_output_shape(0))[1:]]), False)


def _stacked_constants(nodes: Sequence[Any]) -> Any:
    """One constant; OpenVINO holds its memory, whatever becomes of what it was made from."""
    shape = list(nodes[0].get_output_shape(0))
    shape[0] = sum(node.get_output_shape(0)[0] for node in nodes)
    tensor = ov.Tensor(nodes[0].get_output_element_type(0), ov.Shape(shape))
    tensor.data.reshape(-1)[:] = np.concatenate([node.data.reshape(-1) for node in nodes])
    return ov.op.Constant(tensor)


def _ints(values: int | Sequence[int]) -> Any:
    return op.constant(np.array(values, dtype=np.int64))
