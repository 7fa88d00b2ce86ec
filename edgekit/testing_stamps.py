"""A stand-in for the Debian package of Tux Paint's stamps, drawn here, for tests.

Example:
    >>> write_stamp_archive(Path("archives"))                       # doctest: +SKIP
    >>> build_stamps(Path("stamps"), Path("archives"))              # doctest: +SKIP
"""

import colorsys
import io
import zipfile
from collections.abc import Collection
from pathlib import Path

from PIL import Image, ImageDraw

from edgekit.data.stamp_objects import STAMPS

__all__ = ["write_stamp_archive"]

FILE = "tuxpaint-stamps-default_9-1_all.deb"  # of a version that has no listed checksum


def write_stamp_archive(folder: Path, *, without: Collection[str] = ()) -> Path:
    """Write an archive in the package's layout whose objects are ellipses of a colour each.

    Args:
        folder: made here.
        without: stamps to leave out.

    Returns:
        The archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    objects = [paths for theme in STAMPS.values() for paths in theme.values()]
    with zipfile.ZipFile(folder / FILE, "w") as archive:  # which is read as well as Debian's own
        archive.writestr("usr/share/tuxpaint/stamps/animals/mammals/dogs/dog.txt", "A dog.\n")
        for number, paths in enumerate(objects):
            for path in set(paths) - set(without):
                stamp = _stamp(number / len(objects))
                archive.writestr(f"usr/share/tuxpaint/stamps/{path}.png", stamp)
    return folder / FILE


def _stamp(hue: float) -> bytes:
    """A PNG with an ellipse amid nothing."""
    colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 1.0, 0.9))
    image = Image.new("RGBA", (120, 100), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((10, 20, 109, 79), fill=(*colour, 255), outline="black")
    out = io.BytesIO()
    image.save(out, format="png")
    return out.getvalue()
