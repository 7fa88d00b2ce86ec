"""Text files of a user."""

from pathlib import Path

from edgekit.errors import UsageError

__all__ = ["read_text"]


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        UsageError: if it is missing or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as cause:
        raise UsageError(f"{path}: cannot be read ({cause.strerror})") from cause
    except UnicodeDecodeError as cause:
        raise UsageError(f"{path}: not UTF-8 text (byte {cause.start})") from cause
