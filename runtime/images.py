"""Pictures for a vision tower, without torch: read whole, then scaled, cropped and normalised.

The steps are those of Hugging Face's image processors, and `preprocessor_config.json` says which
and how; on 8-bit pictures the numbers are the same.
"""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from edgekit.errors import BundleError, EngineError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MOST_PIXELS",
    "PROCESSOR",
    "FromSettings",
    "ImageProcessor",
    "Picture",
    "normalised",
    "read_image",
]

MOST_PIXELS = 100_000_000
PROCESSOR = "preprocessor_config.json"
UNSUPPORTED = ("do_image_splitting", "do_pan_and_scan")
Floats = npt.NDArray[np.float32]
Picture: TypeAlias = "Path | str | bytes | Image"  # a file, its bytes, or a PIL image


def read_image(source: Picture) -> "Image":
    """A picture in RGB, turned as its camera says.

    Of an animation the first frame counts; transparency is laid on white; 16-bit greys are scaled.

    Args:
        source: a file, its bytes, or a PIL image.

    Raises:
        UsageError: if it is missing, no picture, damaged, or has more than `MOST_PIXELS` pixels.
        EngineError: if Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as cause:
        raise EngineError('pictures need Pillow: pip install "edgekit-lm[vision]"') from cause
    where = str(source) if isinstance(source, Path | str) else "the picture"
    try:
        image = source if isinstance(source, Image.Image) else Image.open(_opened(source))
        if image.width * image.height > MOST_PIXELS:
            raise UsageError(
                f"{where}: {image.width} x {image.height} pixels given; allowed: "
                f"{MOST_PIXELS:,} in all; scale it down first"
            )
        image.load()
    except FileNotFoundError as cause:
        raise UsageError(f"{where}: no such file; give a picture") from cause
    except Image.DecompressionBombError as cause:
        raise UsageError(f"{where}: too large ({cause}); scale it down first") from cause
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as cause:
        raise UsageError(f"{where}: no picture, or damaged ({cause})") from cause
    return _as_rgb(ImageOps.exif_transpose(image))


def _opened(source: Path | str | bytes) -> io.BytesIO:
    """In memory, so that no file stays open."""
    return io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes())


def _as_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_wide_grey(np.asarray(image)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _from_wide_grey(values: npt.NDArray[Any]) -> "Image":
    """A grey picture of more than 8 bits, by its range: up to 1, 255 or 65535."""
    from PIL import Image

    top = float(values.max(initial=0))
    scale = 255.0 if top <= 1 else 1.0 if top <= 255 else 255.0 / 65535.0
    return Image.fromarray(
        (values.astype(np.float64) * scale).round().clip(0, 255).astype(np.uint8)
    )


class FromSettings(ABC):
    """A processor that `preprocessor_config.json` describes."""

    __slots__ = ()

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The processor of a model or bundle directory.

        Raises:
            BundleError: if its file is missing or damaged, or asks for steps that are not known.
        """
        file = directory / PROCESSOR
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as cause:
            raise BundleError(f"{file}: missing; the model reads no pictures") from cause
        except (OSError, ValueError) as cause:
            raise BundleError(f"{file}: damaged ({cause})") from cause
        return cls.of(settings, where=str(file))

    @classmethod
    def of(cls, settings: Any, *, where: str) -> Self:
        """The processor that the contents of its file describe.

        Args:
            settings: a JSON object.
            where: the file, named in errors.

        Raises:
            BundleError: if it is not such a processor's, or asks for steps that are not known.
        """
        try:
            if not isinstance(settings, Mapping):
                raise TypeError("no JSON object")
            return cls._parsed(settings)
        except (ValueError, TypeError, KeyError) as cause:
            raise BundleError(f"{where}: damaged, or not an image processor's ({cause})") from cause

    @classmethod
    @abstractmethod
    def _parsed(cls, given: Mapping[str, Any]) -> Self:
        """From settings; a ValueError, TypeError or KeyError says what is wrong with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessor(FromSettings):
    """The steps from a picture to pixels; None leaves one out.

    Attributes:
        size: height and width to scale to; or one number, for the shorter side.
        resample: Pillow's number of the filter.
        crop: height and width of the middle that is kept.
        rescale: what pixels of 0 to 255 are multiplied with.
        mean: of the three channels, subtracted.
        std: of the three channels, divided by.
    """

    size: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def _parsed(cls, given: Mapping[str, Any]) -> Self:
        asked = [name for name in UNSUPPORTED if given.get(name)]
        if asked:
            raise ValueError(f"{asked[0]} is not supported")
        size, crop = given.get("size"), given.get("crop_size")
        normalised = given.get("do_normalize", True)
        return cls(
            size=_size(size) if given.get("do_resize", True) else None,
            resample=int(given.get("resample", 3)),
            crop=_box(crop) if given.get("do_center_crop", False) else None,
            rescale=float(given["rescale_factor"]) if given.get("do_rescale", True) else None,
            mean=tuple(map(float, given["image_mean"])) if normalised else None,
            std=tuple(map(float, given["image_std"])) if normalised else None,
        )

    def __call__(self, images: "Sequence[Image]") -> Floats:
        """Pixels of RGB pictures, fp32 `[N, 3, H, W]`.

        Raises:
            UsageError: if there is no picture, or they end at different sizes.
        """
        if not images:
            raise UsageError("no picture given; give one or more")
        pixels = [self._pixels(image) for image in images]
        shapes = {array.shape for array in pixels}
        if len(shapes) > 1:
            raise UsageError(f"pictures of sizes {sorted(shapes)} given; allowed: one size")
        return np.stack(pixels)

    def _pixels(self, image: "Image") -> Floats:
        from PIL import Image

        if self.size is not None:
            height, width = self._scaled(image.height, image.width)
            image = image.resize((width, height), Image.Resampling(self.resample))
        values = np.asarray(image)
        if self.crop is not None:
            values = _middle(values, *self.crop)
        found = normalised(values, self.rescale, self.mean, self.std)
        return np.ascontiguousarray(found.transpose(2, 0, 1))

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after scaling."""
        if not isinstance(self.size, int):
            assert self.size is not None
            return self.size
        short, long = sorted((height, width))
        longer = int(self.size * long / short)
        return (self.size, longer) if height <= width else (longer, self.size)


def normalised(
    values: npt.NDArray[np.uint8],
    rescale: float | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Floats:
    """Pixels of 0 to 255 `[H, W, 3]` in fp32: rescaled, and by channel less `mean`, over `std`."""
    found = values.astype(np.float32)
    if rescale is not None:
        found = (values.astype(np.float64) * rescale).astype(np.float32)
    if mean is None or std is None:
        return found
    centre, spread = (np.asarray(three, np.float32) for three in (mean, std))
    return (found - centre) / spread


def _size(given: Any) -> tuple[int, int] | int:
    """`{"shortest_edge": N}`, `{"height": H, "width": W}`, or N for a square."""
    if isinstance(given, Mapping) and "shortest_edge" in given:
        return int(given["shortest_edge"])
    return _box(given)


def _box(given: Any) -> tuple[int, int]:
    if isinstance(given, Mapping):
        return int(given["height"]), int(given["width"])
    return int(given), int(given)


def _middle(values: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """The middle of `[H, W, 3]`, filled with black where it is larger."""
    more = [max(size - have, 0) for size, have in zip((height, width), values.shape, strict=False)]
    if any(more):
        pads = [(-(-n // 2), n // 2) for n in more]
        values = np.pad(values, [*pads, (0, 0)])
    top, left = (values.shape[0] - height) // 2, (values.shape[1] - width) // 2
    return values[top : top + height, left : left + width]
