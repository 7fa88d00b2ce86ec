"""What rounding leaves of an adapter, and that the rounding is the graph's own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch

from edgekit.export.fidelity import measure_fidelity, rounding
from edgekit.export.pipeline import convert
from edgekit.models.weights import MemoryStore
from edgekit.sources import open_source

Checkpoint = Callable[..., Path]
NAME = "model.layers.2.mlp.up_proj"


def stores(ratio: float) -> tuple[MemoryStore, MemoryStore]:
    weight = 0.02 * torch.randn(48, 128)
    pair = torch.randn(48, 4) @ torch.randn(4, 128)
    difference = pair * (0.02 * ratio / pair.square().mean().sqrt())
    name = f"{NAME}.weight"
    return MemoryStore({name: weight}), MemoryStore({name: weight + difference})


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_what_formats_leave(engine: str) -> None:
    before, after = stores(4e-3)
    found = {
        weights: measure_fidelity(before, after, [NAME], engine=engine, weights=weights)
        for weights in ("fp32", "fp16", "int8", "int4")
    }
    assert found["fp32"].noise < 1e-7
    assert found["fp32"].kept == pytest.approx(1)
    assert 0.03 < found["fp16"].noise < 0.1  # half a step of 10 bits over 4e-3 of the weight
    assert found["fp32"].modules[0].ratio == pytest.approx(4e-3, rel=0.05)
    noises = [found[weights].noise for weights in ("fp32", "fp16", "int8", "int4")]
    assert noises == sorted(noises)
    assert found["int8"].loud == found["int4"].loud == 1
    big, after_big = stores(0.5)
    loud = measure_fidelity(big, after_big, [NAME], engine=engine, weights="int4")
    assert loud.noise < 0.5
    assert 0.9 < loud.kept < 1.1
    assert not loud.loud


def test_modules_that_do_not_change_are_left_out() -> None:
    before, _ = stores(1.0)
    assert not measure_fidelity(before, before, [NAME], engine="onnx", weights="int8").modules


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounding_is_what_openvino_gets(
    weights: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama")
    out = tmp_path / "bundle"
    convert(checkpoint, out, weights=weights, formats=["openvino"], verify=False)
    manifest = json.loads((out / "edgekit.json").read_text())
    group = next(s for s in manifest["pipeline"] if s["step"] == "openvino").get("group_size", 64)
    name = "model.layers.1.self_attn.q_proj"
    weight = open_source(checkpoint).weights.tensor(f"{name}.weight")
    expected = rounding("openvino", weights, group)(weight).numpy()
    model = ov.Core().read_model(out / "openvino_model.xml")
    found = _constant_folded(model, name)
    # Where a weight lies halfway between two steps, either is right.
    near = np.isclose(found, expected, atol=1e-4, rtol=2e-3)
    assert near.mean() > 0.995
    assert np.abs(found - expected).max() <= 0.15 * np.abs(expected).max()


def _constant_folded(model: ov.Model, name: str) -> np.ndarray:
    """The weight that the MatMul called `name` reads, computed by OpenVINO."""
    product = next(n for n in model.get_ops() if n.get_friendly_name() == name)
    alone = ov.Model([product.input_value(1)], [], "weight")
    compiled = ov.Core().compile_model(alone, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([])[0])
