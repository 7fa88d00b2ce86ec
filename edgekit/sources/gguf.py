"""A GGUF file, turned once into a directory in Hugging Face's layout and kept in a cache.

Weights are dequantised to fp32 tensor by tensor, and the tokenizer is rebuilt from the file's own
vocabulary. The directory appears whole or not at all: it is written to a sibling and renamed, and
what a killed run left of one is removed by the next conversion.
"""

import os
from pathlib import Path
from typing import Any

from edgekit.errors import SourceError
from edgekit.sources.base import Source, sha256_of
from edgekit.sources.gguf_config import Metadata, foreign_config, generation_config
from edgekit.sources.gguf_tokenizer import write_tokenizer
from edgekit.sources.gguf_weights import write_json, write_weights
from edgekit.sources.hf import open_directory
from edgekit.staging import remove_abandoned, workspace

__all__ = ["cache_directory", "open_gguf"]

FORMAT = 1  # raise it when what is written into the cache changes
MAGIC = b"GGUF"
NOTE = "The weights are those of the GGUF file, dequantised; not the original checkpoint's."


def cache_directory() -> Path:
    """EDGEKIT_CACHE, else edgekit below XDG_CACHE_HOME, else ~/.cache/edgekit."""
    if os.environ.get("EDGEKIT_CACHE"):
        return Path(os.environ["EDGEKIT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edgekit"


def open_gguf(
    path: Path, *, name: str | None = None, kind: str = "gguf", sha256: str | None = None
) -> Source:
    """Open a GGUF file of a supported family.

    Args:
        path: the file.
        name: the source's name; None: the file's, without its suffix.
        kind: what `Source.identity` says.
        sha256: of the file, if the caller knows it already.

    Raises:
        SourceError: if the file is damaged or unreadable, or the cache cannot be written.
        UnsupportedError: if the model, its tokenizer or a tensor type is not one edgekit expresses.
    """
    digest = sha256 or _digest(path)
    directory = cache_directory() / "gguf" / f"{digest[:16]}-v{FORMAT}"
    if not directory.is_dir():
        _convert(path, directory)
    name = name or path.stem
    identity = {"kind": kind, "name": name, "file": path.name, "sha256": digest}
    return open_directory(directory, name=name, identity=identity, notes=(NOTE,))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise SourceError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
        return sha256_of([path])
    except OSError as cause:
        raise SourceError(
            f"{path}: cannot be read ({cause.strerror}); give a GGUF file that you may read"
        ) from cause


def _convert(path: Path, directory: Path) -> None:
    reader = _read(path)
    metadata = Metadata(reader)
    config = foreign_config(metadata)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory.parent)
        with workspace(directory) as work:
            write_tokenizer(metadata, work)
            write_json(work / "config.json", config)
            write_json(work / "generation_config.json", generation_config(metadata))
            write_weights(metadata, work / "model.safetensors")
            _publish(work, directory)
    except OSError as cause:
        raise _unwritable(directory, cause) from cause


def _publish(work: Path, directory: Path) -> None:
    try:
        work.rename(directory)
    except OSError:
        # Another process may have been first; its directory has the same contents.
        if not directory.is_dir():
            raise


def _read(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as cause:
        raise SourceError(
            f"{path}: truncated or damaged GGUF file ({cause}); fetch it again"
        ) from cause


def _unwritable(directory: Path, cause: OSError) -> SourceError:
    return SourceError(
        f"{directory}: cannot be written ({cause.strerror}); make room or set EDGEKIT_CACHE"
    )
