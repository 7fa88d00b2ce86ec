"""Pictures reach the disk whole or not at all."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_png"]


def write_png(figure: "Figure", out: Path) -> None:
    """Write `figure`.

    Raises:
        OSError: if the file cannot be written; an earlier one then stays as it was.
    """
    part = out.with_name(f".{out.name}.part")
    try:
        figure.savefig(part, format="png", dpi=160)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
