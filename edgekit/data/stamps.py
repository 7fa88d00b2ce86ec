"""Pictures with exact lists of what is in them, composed of Tux Paint's stamps; none is committed.

    python -m edgekit.data.stamps -o DIR [--from FOLDER_WITH_ARCHIVES]

The stamps come from the Debian package tuxpaint-stamps-default (GPL-2, 161 MB); pictures of them
are derived works, so they stay on the machine that made them.

DIR/stamps, stamps.json        the stamps of 40 objects in five themes, small, to compose more of
DIR/validation, DIR/test       pictures.jsonl and images: objects that seldom go together, all drawn
DIR/vocabulary.txt             what the objects are called, as CHAIR reads it
DIR/SOURCES.json               where all of it is from

`edgekit spin calibrate` and `edgekit eval --task chair|pope` read a pictures.jsonl and
vocabulary.txt. Pictures to train on are composed while training, from other random numbers.
"""

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from edgekit.command import guarded
from edgekit.data.archives import Archive, CorpusError, members
from edgekit.data.gathering import archive_arguments, gathered, write_sources
from edgekit.data.stamp_objects import STAMPS, SYNONYMS
from edgekit.data.stamp_scenes import BOOK, FOLDER, SURPRISING, StampBook, compose, draw_scene

__all__ = ["ARCHIVE", "PARTS", "ROOT", "build_stamps", "main"]

ARCHIVE = Archive(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
    pattern="tuxpaint-stamps-default_*.deb",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    registry="debian",
    licence="GPL-2; pictures composed of the stamps are derived works",
)
ROOT, ENDING = "usr/share/tuxpaint/stamps/", ".png"
STORED = 64  # pixels of a stamp's longer side
PARTS: Mapping[str, int] = {"validation": 200, "test": 300}  # pictures of each


def build_stamps(
    out: Path, archives: Path | None = None, parts: Mapping[str, int] = PARTS
) -> dict[str, int]:
    """Write stamps, pictures and vocabulary to `out`, all of it or nothing.

    Args:
        out: a directory to make; it must not exist.
        archives: folder with the package; None: download it.
        parts: pictures of each part; fewer are the first ones of more.

    Returns:
        Stamps, and pictures of each part.

    Raises:
        UsageError: if `out` exists or the archive is missing from `archives`.
        CorpusError: if the archive cannot be fetched, is damaged or lacks a stamp.
    """
    with gathered(out, (ARCHIVE,), archives) as (work, paths):
        counts = {FOLDER: _write_stamps(paths[ARCHIVE], work)}
        book = StampBook.read(work)
        for number, (part, count) in enumerate(parts.items(), 1):
            _write_pictures(work / part, book, number, count)
            counts[part] = count
        terms = [", ".join((name, *SYNONYMS.get(name, ()))) for name in book.names]
        (work / "vocabulary.txt").write_text("\n".join(terms) + "\n", encoding="utf-8")
        write_sources(work, paths, counts=counts)
    return counts


def _write_stamps(archive: Path, work: Path) -> int:
    """The stamps that are used, cut to what is not transparent, and the list of them."""
    wanted = {path for objects in STAMPS.values() for paths in objects.values() for path in paths}
    found = _small_stamps(archive, wanted)
    missing = sorted(wanted - found.keys())
    if missing:
        raise CorpusError(f"{archive}: holds no {ROOT}{missing[0]}{ENDING}; fetch it anew")
    (work / FOLDER).mkdir()
    listed: dict[str, dict[str, list[str]]] = {}
    for theme, objects in STAMPS.items():
        for name, paths in objects.items():
            files = [f"{name}-{number}{ENDING}" for number, _ in enumerate(paths)]
            listed.setdefault(theme, {})[name] = files
            for file, path in zip(files, paths, strict=True):
                found[path].save(work / FOLDER / file)
    (work / BOOK).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return len(found)


def _small_stamps(archive: Path, wanted: set[str]) -> dict[str, Image.Image]:
    found = {}
    for name, data in members(archive):
        path = name.removeprefix(ROOT).removesuffix(ENDING)
        if name == f"{ROOT}{path}{ENDING}" and path in wanted:
            found[path] = _small(data, archive, name)
    return found


def _small(data: bytes, archive: Path, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            stamp = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as cause:
        raise CorpusError(f"{archive}: {name} is damaged ({cause}); fetch it anew") from cause
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    stamp.thumbnail((STORED, STORED))
    return stamp


def _write_pictures(folder: Path, book: StampBook, part: int, count: int) -> None:
    """Pictures of scenes that surprise; each follows from its part and number alone."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(count):
        rng = np.random.default_rng([part, number])
        drawn = draw_scene(rng, book.themes, SURPRISING).drawn
        image = f"images/{number:04}{ENDING}"
        compose(rng, book, drawn).save(folder / image)
        lines.append(json.dumps({"image": image, "objects": list(drawn)}) + "\n")
    (folder / "pictures.jsonl").write_text("".join(lines), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = archive_arguments("edgekit.data.stamps", argv)
    return guarded("stamps", lambda: _built(args))


def _built(args: argparse.Namespace) -> str:
    counts: Mapping[str, int] = build_stamps(args.out, args.archives)
    return "\n".join(f"{what:<12}{count:>6,}" for what, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
