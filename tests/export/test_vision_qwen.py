"""The vision side of Qwen2-VL and Qwen2.5-VL on both engines against transformers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino as ov
import pytest
import torch

from edgekit.errors import UnsupportedError
from edgekit.export.vision_qwen import (
    EMBEDDER,
    MERGER,
    PatchSide,
    patches_to_onnx,
    patches_to_openvino,
)
from edgekit.runtime.images_qwen import PatchGrid
from edgekit.testing_vlm import TinyVlm, tiny_vlm

MAX_ABS = 1e-4
GRIDS = [(1, 4, 4), (1, 6, 10), (1, 2, 2), (1, 10, 4)]
Run = Callable[[torch.Tensor, dict[str, np.ndarray]], np.ndarray]


@pytest.fixture(scope="module", params=["qwen2-vl", "qwen2.5-vl"])
def vlm(request: pytest.FixtureRequest) -> TinyVlm:
    return tiny_vlm(request.param)


@pytest.fixture(scope="module")
def models(vlm: TinyVlm) -> dict[str, ov.Model]:
    return patches_to_openvino(PatchSide(vlm.model))


@pytest.fixture
def grids(vlm: TinyVlm, tmp_path: Path) -> PatchGrid:
    vlm.model.config.save_pretrained(tmp_path)
    return PatchGrid.read(tmp_path)


def patches(grid: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(grid[1] * grid[2], 3 * 2 * 8 * 8)


@torch.no_grad()
def expected(vlm: TinyVlm, pixels: torch.Tensor, *grids: tuple[int, int, int]) -> np.ndarray:
    """What the model itself puts in the place of image tokens."""
    found = vlm.model.model.get_image_features(pixels, torch.tensor(grids)).pooler_output
    joined: np.ndarray = torch.cat(found).numpy()
    return joined


def in_a_row(models: dict[str, ov.Model]) -> Run:
    embedder, merger = (
        ov.compile_model(models[name], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for name in (EMBEDDER, MERGER)
    )
    asked = {name for port in merger.inputs for name in port.get_names()}

    def run(pixels: torch.Tensor, inputs: dict[str, np.ndarray]) -> np.ndarray:
        states = embedder({"hidden_states": pixels.numpy()})["last_hidden_state"]
        given = {name: array for name, array in inputs.items() if name in asked}
        found: np.ndarray = merger({**given, "hidden_states": states})["last_hidden_state"]
        return found

    return run


def test_openvino(vlm: TinyVlm, models: dict[str, ov.Model], grids: PatchGrid) -> None:
    run = in_a_row(models)
    for grid in GRIDS:
        pixels = patches(grid)
        found = run(pixels, grids.inputs(grid))
        assert found.shape == (len(pixels) // 4, 64)
        assert np.abs(found - expected(vlm, pixels, grid)).max() <= MAX_ABS


def test_openvino_reads_several_pictures_as_genai_gives_them(
    vlm: TinyVlm, models: dict[str, ov.Model], grids: PatchGrid
) -> None:
    """One after another, kept apart by whole masks."""
    pixels = torch.cat([patches(grid) for grid in GRIDS[:2]])
    apart = [grids.inputs(grid) for grid in GRIDS[:2]]
    first = len(apart[0]["rotary_pos_emb"])
    mask = np.full((1, len(pixels), len(pixels)), -np.inf, np.float32)
    mask[:, :first, :first] = mask[:, first:, first:] = 0
    inputs = {
        "attention_mask": mask,
        "rotary_pos_emb": np.concatenate([one["rotary_pos_emb"] for one in apart]),
    }
    if vlm.family == "qwen2.5-vl":
        windows = np.full_like(mask, -np.inf)
        windows[:, :first, :first] = apart[0]["window_attention_mask"]
        windows[:, first:, first:] = apart[1]["window_attention_mask"]
        order = [apart[0]["window_index"], apart[1]["window_index"] + first // 4]
        inputs |= {"window_attention_mask": windows, "window_index": np.concatenate(order)}
    found = in_a_row(models)(pixels, inputs)
    assert np.abs(found - expected(vlm, pixels, *GRIDS[:2])).max() <= MAX_ABS


def test_the_models_are_those_that_genai_opens(vlm: TinyVlm, models: dict[str, ov.Model]) -> None:
    ports = {
        name: {next(iter(port.get_names())): str(port.get_partial_shape()) for port in model.inputs}
        for name, model in models.items()
    }
    assert ports[EMBEDDER] == {"hidden_states": "[?,384]"}
    windows = {"window_attention_mask": "[1,?,?]", "window_index": "[?]"}
    assert ports[MERGER] == {
        "hidden_states": "[?,32]",
        "attention_mask": "[1,?,?]",
        "rotary_pos_emb": "[?,4]",
    } | (windows if vlm.family == "qwen2.5-vl" else {})


def test_onnx(vlm: TinyVlm, grids: PatchGrid, tmp_path: Path) -> None:
    patches_to_onnx(PatchSide(vlm.model), tmp_path / "vision.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    asked = {value.name for value in session.get_inputs()}
    for grid in GRIDS:
        pixels = patches(grid)
        given = {name: array for name, array in grids.inputs(grid).items() if name in asked}
        found = session.run(["last_hidden_state"], {**given, "pixel_values": pixels.numpy()})[0]
        assert found.shape == (len(pixels) // 4, 64)
        assert np.abs(found - expected(vlm, pixels, grid)).max() <= MAX_ABS


def test_unknown_family() -> None:
    with pytest.raises(UnsupportedError, match="'llava' given; supported: qwen2_vl, qwen2_5_vl"):
        PatchSide(tiny_vlm("llava").model)
