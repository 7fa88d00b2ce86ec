"""Pictures for the vision side of Qwen2-VL and Qwen2.5-VL, without torch.

It reads flattened patches of pictures of any size, and what must be known of their grid: a rotary
angle for each patch (arXiv 2409.12191), and for Qwen2.5-VL the windows that most of its layers
attend within (arXiv 2502.13923). The steps and numbers are those of Hugging Face's processor.

h and w are the patches of a picture's height and width, P = h w; merge x merge of them, which lie
one after another, become one token.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from edgekit.errors import BundleError, UsageError
from edgekit.runtime.images import (
    Floats,
    FromSettings,
    normalised,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PatchGrid", "PatchProcessor", "fitted_size"]

Ints = npt.NDArray[np.int64]
THETA = 10000.0
MOST_ASPECT = 200


def fitted_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Height and width nearest to those given that are multiples of `factor`.

    Their product is at least `least` and at most `most` pixels, as far as one `factor` allows.

    Raises:
        UsageError: if one side is more than `MOST_ASPECT` times the other.
    """
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise UsageError(
            f"a picture of {width} x {height} pixels given; allowed: sides that differ by a factor "
            f"of up to {MOST_ASPECT}"
        )
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchProcessor(FromSettings):
    """The steps from a picture to patches; None leaves one out.

    Attributes:
        pixels: the fewest and the most pixels that a picture is scaled to.
        resample: Pillow's number of the filter.
        rescale: what pixels of 0 to 255 are multiplied with.
        mean: of the three channels, subtracted.
        std: of the three channels, divided by.
        patch: pixels of a patch's side.
        frames: how often a still picture is repeated in a patch.
        merge: patches along each side of what becomes one token.
    """

    pixels: tuple[int, int] | None
    resample: int
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    patch: int
    frames: int
    merge: int

    @classmethod
    def _parsed(cls, given: Mapping[str, Any]) -> Self:
        normalise = given.get("do_normalize", True)
        return cls(
            pixels=_pixel_range(given) if given.get("do_resize", True) else None,
            resample=int(given.get("resample", 3)),
            rescale=float(given.get("rescale_factor", 1 / 255))
            if given.get("do_rescale", True)
            else None,
            mean=tuple(map(float, given["image_mean"])) if normalise else None,
            std=tuple(map(float, given["image_std"])) if normalise else None,
            patch=int(given["patch_size"]),
            frames=int(given["temporal_patch_size"]),
            merge=int(given["merge_size"]),
        )

    def __call__(self, images: "Sequence[Image]") -> tuple[Floats, Ints]:
        """Patches of RGB pictures.

        Returns:
            fp32 `[patches of all, 3 * frames * patch * patch]`, and time (1), height and width of
            each picture in patches, int64 `[N, 3]`.

        Raises:
            UsageError: if there is no picture, or one has sides that cannot be cut.
        """
        if not images:
            raise UsageError("no picture given; give one or more")
        found = [self._cut(self._scaled(image)) for image in images]
        return np.concatenate([patches for patches, _ in found]), np.array(
            [grid for _, grid in found], np.int64
        )

    def _scaled(self, image: "Image") -> Floats:
        """Pixels `[H, W, 3]` whose sides are multiples of a token's."""
        from PIL import Image

        factor = self.patch * self.merge
        if self.pixels is not None:
            height, width = fitted_size(image.height, image.width, factor, *self.pixels)
            image = image.resize((width, height), Image.Resampling(self.resample))
        elif image.height % factor or image.width % factor:
            raise UsageError(
                f"a picture of {image.width} x {image.height} pixels given; allowed: multiples of "
                f"{factor}, since this model's pictures are not scaled"
            )
        return normalised(np.asarray(image), self.rescale, self.mean, self.std)

    def _cut(self, pixels: Floats) -> tuple[Floats, tuple[int, int, int]]:
        """Patches of one picture, token after token, and its grid."""
        height, width = (side // self.patch for side in pixels.shape[:2])
        merge, patch = self.merge, self.patch
        apart = pixels.reshape(height // merge, merge, patch, width // merge, merge, patch, 3)
        ordered = apart.transpose(0, 3, 1, 4, 6, 2, 5)  # [.., channel, row, column]
        flat = ordered.reshape(height * width, 3, 1, patch * patch)
        return flat.repeat(self.frames, axis=2).reshape(height * width, -1), (1, height, width)


def _pixel_range(given: Mapping[str, Any]) -> tuple[int, int]:
    """`min_pixels` and `max_pixels`, which come first, or the edges of `size`, which mean these."""
    size = given.get("size") or {}
    least = given.get("min_pixels") or size.get("shortest_edge") or size["min_pixels"]
    most = given.get("max_pixels") or size.get("longest_edge") or size["max_pixels"]
    return int(least), int(most)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchGrid:
    """What the vision side's graphs ask about the grid of a picture.

    Attributes:
        angles: rotary angles of a patch, half of them for its row and half for its column.
        merge: patches along each side of a token.
        window: tokens along each side of a window; None: no layer has windows.
    """

    angles: int
    merge: int = 2
    window: int | None = None

    @classmethod
    def read(cls, directory: Path) -> "PatchGrid":
        """From `config.json` of a model or bundle directory.

        Raises:
            BundleError: if it is missing or damaged, or has no such vision side.
        """
        file = directory / "config.json"
        try:
            return cls.of(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as cause:
            raise BundleError(f"{file}: no vision side of patches in it ({cause})") from cause

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "PatchGrid":
        """The same from the contents of config.json; errors are those of what is missing there."""
        vision = given["vision_config"]
        merge = int(vision.get("spatial_merge_size", 2))
        windowed = given["model_type"] == "qwen2_5_vl"
        width = int(vision["hidden_size" if windowed else "embed_dim"])
        window = int(vision.get("window_size", 112)) // merge // int(vision.get("patch_size", 14))
        return cls(
            angles=width // int(vision["num_heads"]) // 2,
            merge=merge,
            window=window if windowed else None,
        )

    def inputs(self, grid: Sequence[int] | Ints) -> dict[str, npt.NDArray[Any]]:
        """Inputs of the graphs beside the patches, by name, for one picture.

        Args:
            grid: time, height and width in patches: a row of what `PatchProcessor` returns.

        Returns:
            `rotary_pos_emb` fp32 `[P, angles]`; `attention_mask` fp32 `[1, 1, 1]`, for graphs that
            have it: nothing is hidden. With windows also `window_index` int64 `[P / merge^2]`, the
            tokens window by window, and `window_attention_mask` fp32 `[1, P, P]`, 0 within a window
            and -inf between two, in that order.
        """
        _, height, width = (int(size) for size in grid)
        found: dict[str, npt.NDArray[Any]] = {
            "rotary_pos_emb": self._rotary(height, width),
            "attention_mask": np.zeros((1, 1, 1), np.float32),
        }
        if self.window is not None:
            order, owner = self._windows(height // self.merge, width // self.merge)
            found["window_index"] = order
            patches = owner[order].repeat(self.merge**2)
            same = patches[:, None] == patches
            found["window_attention_mask"] = np.where(same, np.float32(0), np.float32(-np.inf))[
                None
            ]
        return found

    def _rotary(self, height: int, width: int) -> Floats:
        merge = self.merge
        places = np.indices((height, width)).reshape(
            2, height // merge, merge, width // merge, merge
        )
        places = places.transpose(1, 3, 2, 4, 0).reshape(height * width, 2, 1)
        exponents = np.arange(0, self.angles, 2, dtype=np.float32) / np.float32(self.angles)
        frequencies = np.float32(1) / np.float32(THETA) ** exponents
        return (places.astype(np.float32) * frequencies).reshape(height * width, self.angles)

    def _windows(self, height: int, width: int) -> tuple[Ints, Ints]:
        """The order of the tokens, and of each token its window."""
        assert self.window is not None
        rows, columns = np.divmod(np.arange(height * width), width)
        across = -(-width // self.window)
        owner = rows // self.window * across + columns // self.window
        return np.argsort(owner, kind="stable"), owner
