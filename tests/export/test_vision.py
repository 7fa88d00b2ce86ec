"""The vision side on both engines against transformers."""

from pathlib import Path

import numpy as np
import onnxruntime
import openvino as ov
import pytest
import torch

from edgekit.errors import UnsupportedError
from edgekit.export.vision import VisionSide, vision_to_onnx, vision_to_openvino
from edgekit.testing_vlm import TinyVlm, tiny_vlm

MAX_ABS = 1e-4


@pytest.fixture(params=["llava", "smolvlm", "gemma3"])
def vlm(request: pytest.FixtureRequest) -> TinyVlm:
    return tiny_vlm(request.param)


@torch.no_grad()
def expected(vlm: TinyVlm, pixels: torch.Tensor) -> np.ndarray:
    """What the model itself puts in the place of image tokens."""
    given = pixels[None] if vlm.family == "smolvlm" else pixels
    options = {}
    if vlm.family == "llava":
        config = vlm.model.config
        options["vision_feature_layer"] = config.vision_feature_layer
        options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
    found = vlm.model.model.get_image_features(given, return_dict=True, **options).pooler_output
    return torch.stack(list(found)).numpy()


@pytest.mark.parametrize("count", [1, 3])
def test_openvino(vlm: TinyVlm, count: int) -> None:
    pixels = vlm.pixels(count)["pixel_values"]
    compiled = ov.compile_model(
        vision_to_openvino(VisionSide(vlm.model)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = compiled({"pixel_values": pixels.numpy()})["last_hidden_state"]
    assert found.shape == (count, vlm.tokens, 64)
    assert np.abs(found - expected(vlm, pixels)).max() <= MAX_ABS


@pytest.mark.parametrize("count", [1, 3])
def test_onnx(vlm: TinyVlm, count: int, tmp_path: Path) -> None:
    pixels = vlm.pixels(count)["pixel_values"]
    vision_to_onnx(VisionSide(vlm.model), tmp_path / "vision.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    found = session.run(["last_hidden_state"], {"pixel_values": pixels.numpy()})[0]
    assert found.shape == (count, vlm.tokens, 64)
    assert np.abs(found - expected(vlm, pixels)).max() <= MAX_ABS


def test_unknown_family() -> None:
    with pytest.raises(UnsupportedError, match="'qwen2_vl' given; supported: llava, smolvlm"):
        VisionSide(tiny_vlm("qwen2-vl").model)
