"""The one place where a missing optional package becomes a line that says what to install."""

import contextlib
from collections.abc import Iterator

from edgekit.errors import EdgekitError

__all__ = ["extra"]


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports that need the packages of `edgekit-lm[name]`.

    Raises:
        EdgekitError: naming the missing package and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as cause:
        if cause.name is None or cause.name.split(".")[0] == "edgekit":
            raise
        raise EdgekitError(
            f"{cause.name} is not installed, which this command needs; "
            f'pip install "edgekit-lm[{name}]"'
        ) from cause
