"""Pictures: what is read, what is refused, and the numbers of transformers' processors."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from edgekit.errors import BundleError, UsageError
from edgekit.runtime import images
from edgekit.runtime.images import ImageProcessor, read_image

SIZES = [(40, 40), (31, 97), (97, 31), (336, 200), (20, 300), (8, 8)]  # width, height


def noise(width: int, height: int, bands: int = 3) -> np.ndarray:
    rng = np.random.default_rng(width * height)
    values = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return values[..., 0] if bands == 1 else values


def saved(processor: Any, folder: Path) -> ImageProcessor:
    processor.save_pretrained(folder)
    return ImageProcessor.read(folder)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "theirs",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": 48, "width": 40}),
        CLIPImageProcessorPil(do_resize=False, crop_size={"height": 35, "width": 50}),
        SiglipImageProcessorPil(size={"height": 56, "width": 42}),
        SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=2, do_normalize=False),
        SiglipImageProcessorPil(size={"height": 28, "width": 28}, do_rescale=False),
    ],
    ids=["clip", "odd crop", "crop alone", "siglip", "bilinear", "not rescaled"],
)
def test_pixels_are_those_of_transformers(
    theirs: Any, size: tuple[int, int], tmp_path: Path
) -> None:
    picture = Image.fromarray(noise(*size))
    expected = theirs(picture, return_tensors="np")["pixel_values"]
    actual = saved(theirs, tmp_path)([picture])
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-6 * max(np.abs(expected).max(), 1)


def test_pictures_of_all_kinds_become_rgb(tmp_path: Path) -> None:
    values = noise(12, 9)
    plain = Image.fromarray(values)
    assert np.array_equal(np.asarray(read_image(plain)), values)
    for name, mode in (("a.png", "RGB"), ("a.png", "L"), ("a.png", "P"), ("a.tif", "CMYK")):
        plain.convert(mode).save(tmp_path / name)
        read = read_image(tmp_path / name)
        assert (read.mode, read.size) == ("RGB", (12, 9))
        assert np.array_equal(np.asarray(read), np.asarray(plain.convert(mode).convert("RGB")))
    written = io.BytesIO()
    plain.save(written, "PNG")
    assert np.array_equal(np.asarray(read_image(written.getvalue())), values)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 4), np.uint8)
    values[0, :, 3] = 255
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[..., 0].tolist() == [[0, 0], [255, 255]]


def test_wide_greys_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 128, 255]


def test_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


def test_pictures_are_turned_as_the_camera_says(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(6, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read), np.rot90(np.asarray(picture), -1))


def test_what_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"none\.png: no such file; give a picture"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"text\.png: no picture, or damaged"):
        read_image(tmp_path / "text.png")
    Image.fromarray(noise(40, 40)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cut\.png: no picture, or damaged"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(UsageError, match="the picture: no picture, or damaged"):
        read_image(b"")
    monkeypatch.setattr(images, "MOST_PIXELS", 100)
    Image.fromarray(noise(11, 10)).save(tmp_path / "huge.png")
    with pytest.raises(UsageError, match="11 x 10 pixels given; allowed: 100 in all"):
        read_image(tmp_path / "huge.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing; the model reads no pictures"),
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"size": {"height": 4}}), "damaged"),
        (json.dumps({"do_image_splitting": True}), "do_image_splitting is not supported"),
    ],
    ids=["missing", "cut", "list", "size", "tiles"],
)
def test_bad_processors(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(BundleError, match=message):
        ImageProcessor.read(tmp_path)


def test_no_picture_or_sizes_that_differ() -> None:
    processor = ImageProcessor(size=None, resample=3, crop=None, rescale=None, mean=None, std=None)
    with pytest.raises(UsageError, match="no picture given"):
        processor([])
    with pytest.raises(UsageError, match="allowed: one size"):
        processor([Image.new("RGB", (4, 5)), Image.new("RGB", (5, 4))])
