"""Tiles of pictures, and their small copies, against transformers' Idefics3 and SmolVLM."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edgekit.errors import BundleError, UsageError
from edgekit.runtime import images_tiles
from edgekit.runtime.images_tiles import TileProcessor, scaled_size

SIZES = [  # width, height
    (96, 96),
    (64, 96),
    (32, 32),
    (31, 97),
    (250, 30),
    (97, 331),
    (300, 3),
    (1, 500),
    (7, 5),
    (1, 1),
]
SIDE = {"longest_edge": 32}


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(processor: Any, folder: Path) -> TileProcessor:
    processor.save_pretrained(folder)
    return TileProcessor.read(folder)


def check(theirs: Any, ours: TileProcessor, pictures: list[Image.Image]) -> None:
    """Squares and grids of several pictures in one call."""
    expected = theirs(pictures, return_tensors="np", return_row_col_info=True)
    assert expected["pixel_attention_mask"].all()
    pixels = expected["pixel_values"][0]
    squares, grids = ours(pictures)
    assert squares.dtype == np.float32
    assert grids.dtype == np.int64
    assert grids[:, 0].tolist() == [1] * len(pictures)
    assert np.array_equal(grids[:, 1:].T, [expected["rows"][0], expected["cols"][0]])
    assert squares.shape == pixels.shape
    assert len(squares) == (grids[:, 1:].prod(axis=1) + 1).sum()
    assert np.abs(squares - pixels).max() <= 1e-6 * max(np.abs(pixels).max(), 1)


def made(kind: Any = SmolVLMImageProcessorPil, longest: int = 96, **settings: Any) -> Any:
    given = {"size": {"longest_edge": longest}, "max_image_size": SIDE, **settings}
    return kind(**given)


@pytest.mark.parametrize(
    "theirs",
    [
        made(),
        made(Idefics3ImageProcessorPil),
        made(longest=65),
        made(longest=64, resample=2, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]),
        made(longest=20),
        made(size={"height": 40, "width": 70}),
        made(do_resize=False),
        made(do_normalize=False),
        made(do_rescale=False),
        made(do_image_splitting=False),
        made(do_image_splitting=False, do_resize=False),
    ],
    ids=[
        "smolvlm",
        "idefics3",
        "odd edge",
        "bilinear",
        "one tile",
        "height and width",
        "not scaled",
        "not normalised",
        "not rescaled",
        "not cut",
        "small copies alone",
    ],
)
def test_squares_are_those_of_transformers(theirs: Any, tmp_path: Path) -> None:
    pictures = [noise(*size) for size in SIZES]
    ours = saved(theirs, tmp_path)
    check(theirs, ours, pictures)
    for picture in pictures:
        check(theirs, ours, [picture])


def test_published_sizes(tmp_path: Path) -> None:
    """Of SmolVLM-256M, whose tiles have 512 pixels, on a picture of a camera's shape."""
    sizes = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    theirs = SmolVLMImageProcessorPil(**sizes)
    ours = saved(theirs, tmp_path)
    picture = noise(400, 300)
    assert ours([picture])[1].tolist() == [[1, 3, 4]]
    check(theirs, ours, [picture])


def test_sizes_are_those_of_transformers() -> None:
    rng = np.random.default_rng(0)
    for height, width, longer in rng.integers(1, 3000, (500, 3)).tolist():
        blank = np.empty((3, height, width), np.uint8)
        assert scaled_size(height, width, longer, 2) == get_resize_output_image_size(blank, longer)


def test_longest_edges_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "transformers.models.smolvlm.image_processing_pil_smolvlm.MAX_IMAGE_SIZE"
    monkeypatch.setattr(module, 80)
    monkeypatch.setattr(images_tiles, "MOST_EDGE", 80)
    theirs = made(longest=101)
    check(theirs, saved(theirs, tmp_path), [noise(*size) for size in SIZES])


def test_what_cannot_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = saved(made(do_resize=False), tmp_path)
    with pytest.raises(UsageError, match="no picture given"):
        ours([])
    monkeypatch.setattr(images_tiles, "MOST_PIXELS", 32 * 95)
    assert ours([noise(64, 1)])[1].tolist() == [[1, 1, 2]]
    with pytest.raises(UsageError, match="65 x 1 pixels given, in tiles 96 x 32; allowed: 3,040"):
        ours([noise(65, 1)])


@pytest.mark.parametrize(
    "change",
    [{"size": 96}, {"size": {}}, {"max_image_size": None}, {"image_mean": None}],
    ids=str,
)
def test_bad_files(change: dict[str, Any], tmp_path: Path) -> None:
    settings = made().to_dict()
    TileProcessor.of(settings, where="here")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(BundleError, match=r"preprocessor_config\.json: damaged"):
        TileProcessor.read(tmp_path)
