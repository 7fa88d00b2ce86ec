"""Patches of pictures, and what is said of their grid, against transformers' Qwen2-VL."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from edgekit.errors import BundleError, UsageError
from edgekit.runtime.images_qwen import PatchGrid, PatchProcessor, fitted_size
from edgekit.testing_vlm import tiny_vlm

SIZES = [(56, 56), (31, 97), (400, 60), (336, 200), (20, 300), (8, 8)]  # width, height


def noise(width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng(width * height)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(processor: Any, folder: Path) -> PatchProcessor:
    processor.save_pretrained(folder)
    return PatchProcessor.read(folder)


@pytest.mark.parametrize("factor", [16, 28])
def test_sizes_are_those_of_transformers(factor: int) -> None:
    rng = np.random.default_rng(factor)
    for height, width in rng.integers(1, 700, (500, 2)).tolist():
        least, most = sorted(rng.integers(1, 300_000, 2).tolist())
        if max(height, width) > 200 * min(height, width):
            continue
        expected = smart_resize(height, width, factor, least, most)
        assert fitted_size(height, width, factor, least, most) == expected
    with pytest.raises(UsageError, match="a picture of 201 x 1 pixels given; allowed: sides that"):
        fitted_size(1, 201, factor, 1, 10**6)


@pytest.mark.parametrize(
    "theirs",
    [
        Qwen2VLImageProcessorPil(),
        Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 20),
        Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, max_pixels=40_000, resample=2),
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=3, temporal_patch_size=1),
        Qwen2VLImageProcessorPil(do_normalize=False),
        Qwen2VLImageProcessorPil(do_rescale=False),
    ],
    ids=["usual", "small", "patch 8", "merge 3", "not normalised", "not rescaled"],
)
def test_patches_are_those_of_transformers(theirs: Any, tmp_path: Path) -> None:
    pictures = [Image.fromarray(noise(*size)) for size in SIZES]
    expected = theirs(pictures, return_tensors="np")
    patches, grids = saved(theirs, tmp_path)(pictures)
    assert patches.dtype == np.float32
    assert grids.dtype == np.int64
    assert np.array_equal(grids, expected["image_grid_thw"])
    assert patches.shape == expected["pixel_values"].shape
    largest = max(np.abs(expected["pixel_values"]).max(), 1)
    assert np.abs(patches - expected["pixel_values"]).max() <= 1e-6 * largest


def test_published_settings(tmp_path: Path) -> None:
    """As in the files of Qwen2-VL: without `size`, `do_resize` and the like."""
    settings = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14} | {
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    picture = Image.fromarray(noise(90, 130))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(picture, return_tensors="np")
    patches, grids = PatchProcessor.read(tmp_path)([picture])
    assert np.array_equal(grids, theirs["image_grid_thw"])
    assert np.abs(patches - theirs["pixel_values"]).max() <= 2e-6


def test_pictures_that_are_not_scaled(tmp_path: Path) -> None:
    theirs = Qwen2VLImageProcessorPil(do_resize=False)
    ours, picture = saved(theirs, tmp_path), Image.fromarray(noise(84, 56))
    patches, grids = ours([picture])
    assert grids.tolist() == [[1, 4, 6]]
    expected = theirs(picture, return_tensors="np")["pixel_values"]
    assert np.abs(patches - expected).max() <= 2e-6
    with pytest.raises(UsageError, match="85 x 56 pixels given; allowed: multiples of 28"):
        ours([Image.fromarray(noise(85, 56))])
    with pytest.raises(UsageError, match="no picture given"):
        ours([])


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 10, 2), (1, 2, 14), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl"])
def test_grids_are_told_as_in_transformers(
    family: str, grid: tuple[int, int, int], tmp_path: Path
) -> None:
    model = tiny_vlm(family).model
    model.config.save_pretrained(tmp_path)
    inputs = PatchGrid.read(tmp_path).inputs(grid)
    tower, given = model.model.visual, torch.tensor([grid])
    expected = tower.rot_pos_emb(given).numpy()
    assert inputs["rotary_pos_emb"].dtype == np.float32
    assert np.abs(inputs["rotary_pos_emb"] - expected).max() <= 1e-6
    assert ("window_index" in inputs) == (family == "qwen2.5-vl")
    if family == "qwen2.5-vl":
        order, bounds = tower.get_window_index(given)
        assert np.array_equal(inputs["window_index"], order.numpy())
        hidden = np.full((1, grid[1] * grid[2], grid[1] * grid[2]), -np.inf, np.float32)
        for start, end in itertools.pairwise(bounds):
            hidden[0, start:end, start:end] = 0
        assert np.array_equal(inputs["window_attention_mask"], hidden)


@pytest.mark.parametrize(
    ("family", "width", "expected"),
    [
        ("qwen2_vl", "embed_dim", PatchGrid(angles=40)),
        ("qwen2_5_vl", "hidden_size", PatchGrid(angles=40, window=4)),
    ],
)
def test_published_configs(family: str, width: str, expected: PatchGrid, tmp_path: Path) -> None:
    """Which leave out what is usual."""
    config = {"model_type": family, "vision_config": {width: 1280, "num_heads": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert PatchGrid.read(tmp_path) == expected


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"model_type": "llava"}'])
def test_bad_files(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        for name in ("config.json", "preprocessor_config.json"):
            (tmp_path / name).write_text(content)
    with pytest.raises(BundleError, match=r"config\.json: no vision side of patches in it"):
        PatchGrid.read(tmp_path)
    with pytest.raises(BundleError, match=r"preprocessor_config\.json: (missing|damaged)"):
        PatchProcessor.read(tmp_path)
