"""From what the user typed to an opened source."""

import re
from pathlib import Path

from edgekit.errors import SourceError, UsageError
from edgekit.sources.base import Source

__all__ = ["open_source"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ALLOWED = "allowed: a model directory, a .gguf file, a Hub id (owner/name) or smollm2-135m-instruct"


def open_source(spec: str | Path, *, revision: str | None = None) -> Source:
    """Open a model, wherever it comes from.

    Something on disk comes first, then the built-in name, then the Hub.

    Args:
        spec: a Hugging Face directory, a `.gguf` file, a Hub id, or `smollm2-135m-instruct`.
        revision: branch, tag or commit; for a Hub id only.

    Returns:
        The source, with every tensor's presence and shape checked.

    Raises:
        SourceError: if it is missing, damaged or not readable safely.
        UnsupportedError: if it is sound but not of a supported family.
        UsageError: if `revision` is given for something that has none.

    Example:
        >>> source = open_source("smollm2-135m-instruct")          # doctest: +SKIP
        >>> source.config.num_layers                               # doctest: +SKIP
        30
    """
    from edgekit.sources.builtin import BUILT_IN, open_built_in

    path = Path(spec).expanduser()
    on_hub = isinstance(spec, str) and not path.exists() and HUB_ID.fullmatch(spec) is not None
    if revision is not None and not on_hub:
        raise UsageError(f"revision {revision!r} given for {spec}; allowed: with a Hub id only")
    if path.is_dir() and str(spec):  # Path("") is the current directory
        from edgekit.sources.hf import open_directory

        return open_directory(path)
    if path.is_file():
        return _open_file(path)
    if str(spec).lower() in BUILT_IN:
        return open_built_in(str(spec).lower())
    if on_hub and path.suffix != ".gguf":
        from edgekit.sources.hub import open_hub

        return open_hub(str(spec), revision=revision)
    raise SourceError(f"{spec}: no such source; {ALLOWED}")


def _open_file(path: Path) -> Source:
    if path.suffix.lower() != ".gguf":
        raise SourceError(f"{path}: a single {path.suffix or 'plain'} file given; {ALLOWED}")
    from edgekit.sources.gguf import open_gguf

    return open_gguf(path)
