"""Pictures in tiles for the vision side of Idefics3 and SmolVLM, without torch.

A picture is scaled until its longer side has a given length, then until both sides are multiples of
a tile's, and cut into tiles, row after row; a small copy of the whole comes last (arXiv
2408.12637). The steps and numbers are those of Hugging Face's processors: each scaling starts from
the 8-bit picture that the one before made, and sizes are rounded as there.

S is a tile's side in pixels; all tiles and small copies are squares of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from edgekit.errors import UsageError
from edgekit.runtime.images import (
    MOST_PIXELS,
    Floats,
    FromSettings,
    normalised,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TileProcessor", "scaled_size"]

Ints = npt.NDArray[np.int64]
LANCZOS = 1
MOST_EDGE = 4096
UNCUT = (1, 0, 0)


def scaled_size(height: int, width: int, longer: int, step: int = 1) -> tuple[int, int]:
    """Height and width with the longer side at `longer` and about the same ratio.

    The other side is truncated, and then made a multiple of `step`, upwards; of two equal sides it
    is the height.
    """
    ratio = width / height
    if width >= height:
        return max(_upwards(int(longer / ratio), step), 1), longer
    return longer, max(_upwards(int(longer * ratio), step), 1)


def _upwards(side: int, step: int) -> int:
    return -(-side // step) * step


@dataclass(frozen=True, kw_only=True, slots=True)
class TileProcessor(FromSettings):
    """The steps from a picture to squares; None leaves one out.

    Attributes:
        size: length to scale the longer side to; or height and width.
        side: S.
        split: whether a picture is cut; otherwise there is only its small copy.
        resample: Pillow's number of the filter.
        rescale: what pixels of 0 to 255 are multiplied with.
        mean: of the three channels, subtracted.
        std: of the three channels, divided by.
    """

    size: int | tuple[int, int] | None
    side: int
    split: bool
    resample: int
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def _parsed(cls, given: Mapping[str, Any]) -> Self:
        normalise = given.get("do_normalize", True)
        return cls(
            size=_size(given["size"]) if given.get("do_resize", True) else None,
            side=int(given["max_image_size"]["longest_edge"]),
            split=bool(given.get("do_image_splitting", True)),
            resample=int(given.get("resample", LANCZOS)),
            rescale=float(given.get("rescale_factor", 1 / 255))
            if given.get("do_rescale", True)
            else None,
            mean=tuple(map(float, given["image_mean"])) if normalise else None,
            std=tuple(map(float, given["image_std"])) if normalise else None,
        )

    def __call__(self, images: "Sequence[Image]") -> tuple[Floats, Ints]:
        """Squares of RGB pictures.

        Returns:
            fp32 `[squares of all, 3, S, S]`, and for each picture 1 and the rows and columns of its
            tiles, int64 `[N, 3]`; these are 0 for a picture that was not cut. A picture has
            rows * columns + 1 squares.

        Raises:
            UsageError: if there is no picture, or the tiles of one would have more than
                `MOST_PIXELS` pixels.
        """
        if not images:
            raise UsageError("no picture given; give one or more")
        found = [self._squares(self._scaled(image)) for image in images]
        return np.concatenate([squares for squares, _ in found]), np.array(
            [grid for _, grid in found], np.int64
        )

    def _scaled(self, image: "Image") -> "Image":
        """The picture in its own ratio."""
        if self.size is None:
            return image
        if isinstance(self.size, tuple):
            return self._resized(image, *self.size)
        height, width = scaled_size(image.height, image.width, self.size, 2)
        if max(height, width) > MOST_EDGE:
            height, width = scaled_size(height, width, MOST_EDGE)
        return self._resized(image, height, width)

    def _squares(self, image: "Image") -> tuple[Floats, tuple[int, int, int]]:
        """Tiles and small copy of one picture, and its grid."""
        if self.split:
            image = self._to_multiples(image)
        small = self._pixels(self._resized(image, self.side, self.side))[None]
        rows, columns = image.height // self.side, image.width // self.side
        if not self.split or rows * columns == 1:
            return small, UNCUT
        apart = self._pixels(image).reshape(3, rows, self.side, columns, self.side)
        tiles = apart.transpose(1, 3, 0, 2, 4).reshape(-1, *small.shape[1:])
        return np.concatenate((tiles, small)), (1, rows, columns)

    def _to_multiples(self, image: "Image") -> "Image":
        longer = _upwards(max(image.size), self.side)
        height, width = scaled_size(image.height, image.width, longer, self.side)
        if height * width > MOST_PIXELS:
            raise UsageError(
                f"a picture of {image.width} x {image.height} pixels given, in tiles {width} x "
                f"{height}; allowed: {MOST_PIXELS:,} in all; scale it down first"
            )
        return self._resized(image, height, width)

    def _resized(self, image: "Image", height: int, width: int) -> "Image":
        from PIL import Image

        return image.resize((width, height), Image.Resampling(self.resample))

    def _pixels(self, image: "Image") -> Floats:
        """fp32 `[3, H, W]`."""
        found = normalised(np.asarray(image), self.rescale, self.mean, self.std)
        return found.transpose(2, 0, 1)


def _size(given: Any) -> int | tuple[int, int]:
    """`{"longest_edge": N}`, or `{"height": H, "width": W}`."""
    if "longest_edge" in given:
        return int(given["longest_edge"])
    return int(given["height"]), int(given["width"])
