"""Products that read the same vector are one product, and say bit for bit what they said."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as op

from edgekit.export.pipeline import convert
from edgekit.runtime.ov_joining import join_products
from edgekit.runtime.ov_shapes import fix_shapes

PRECISE = {"INFERENCE_PRECISION_HINT": "f32"}


def products(model: ov.Model) -> int:
    return sum(node.get_type_name() == "MatMul" for node in model.get_ops())


def spoken(model: ov.Model, tokens: Sequence[int]) -> np.ndarray:
    """Logits after each token, `[N, V]`."""
    request = ov.Core().compile_model(model, "CPU", PRECISE).create_infer_request()
    feeds = [{p.get_any_name(): np.array([[t]]) for p in model.inputs} for t in tokens]
    return np.concatenate([request.infer(feed)["logits"][:, 0] for feed in feeds])


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize(
    ("family", "mixer"), [("llama", "lawcat"), ("qwen2", "lawcat"), ("llama", "lolcats")]
)
def test_decoders_say_the_same_in_fewer_products(
    family: str, mixer: str, weights: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"mixer": mixer, "weights": weights, "formats": ("openvino",)}
    convert(tiny_checkpoint(family), tmp_path / "bundle", verify=False, **settings)
    model = ov.Core().read_model(tmp_path / "bundle/openvino_model.xml")
    fix_shapes(model, 1)
    joined = model.clone()
    join_products(joined)
    layers = 3
    assert products(joined) <= products(model) - 3 * layers  # q, k and v are one, gate and up too
    tokens = [5, 300, 7, 7, 12]
    assert np.array_equal(spoken(joined, tokens), spoken(model, tokens))


def graph(*matrices: np.ndarray, shared: bool = True) -> ov.Model:
    """Products of each matrix with one input, or with one each."""
    xs = [ov.op.Parameter(ov.Type.f32, ov.PartialShape([1, 4])) for _ in matrices]
    ys = [
        op.matmul(xs[0] if shared else x, op.constant(matrix), False, True)
        for x, matrix in zip(xs, matrices, strict=True)
    ]
    return ov.Model([op.result(y) for y in ys], xs[:1] if shared else xs, "products")


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (graph(np.ones((2, 4), np.float32), np.ones((5, 4), np.float32)), 1),
        (graph(np.ones((2, 4), np.float32), np.ones((5, 4), np.float32), shared=False), 2),
    ],
    ids=["one vector", "two vectors"],
)
def test_only_what_reads_the_same_is_joined(model: ov.Model, left: int) -> None:
    join_products(model)
    assert products(model) == left


def test_matrices_that_are_stored_otherwise_stay_apart() -> None:
    x = ov.op.Parameter(ov.Type.f32, ov.PartialShape([1, 4]))
    plain = op.constant(np.ones((2, 4), np.float32))
    half = op.convert(op.constant(np.ones((2, 4), np.float16)), "f32")
    held = op.matmul(x, x, False, True)
    ys = [op.matmul(x, plain, False, True), op.matmul(x, half, False, True), held]
    model = ov.Model([op.result(y) for y in ys], [x], "products")
    join_products(model)
    assert products(model) == 3
