"""Before a burst: everything that the far machine lacks, in parts."""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import edgekit
from edgekit.config import dump
from edgekit.data.documents import DATASETS, TEXT_ENDINGS, plain_name
from edgekit.distill.burst.pieces import SOFTWARE, Entry, Plan, cut, newest
from edgekit.distill.burst.software import HERE, archive
from edgekit.distill.metrics import FILE
from edgekit.errors import UsageError
from edgekit.sources.builtin import BUILT_IN, locate_built_in
from edgekit.staging import refuse_existing

__all__ = ["BURST", "pack", "write_burst"]

BURST = "burst.pyz"
PIECE = 4 * 2**20
OVERHEAD = 512  # bytes that a zip adds to a piece: its name twice, and records
ENTRANCE = "from edgekit.distill.burst.train import main\n\nraise SystemExit(main())\n"
SOURCES = (".py", ".toml", ".txt")  # of edgekit's own files
SUFFIXES = (*TEXT_ENDINGS, ".jsonl", ".toml")
MODELS = ("config.json", "student.json")  # in a directory that is a source or a student
OURS = ("--resume", "--force", "--stop-after")
Files = list[tuple[Path, str]]  # a file here, and its path there
Places = dict[str, tuple[Path, int, int]]  # file, offset and size of a piece, by its name


def pack(
    folder: Path, arguments: Sequence[str], *, python: str | None = None, part_mib: int = 60
) -> Plan:
    """Write `burst.pyz` and its parts; a part that is right already stays as it is.

    Args:
        folder: to write into.
        arguments: of `edgekit distill`, the source first; files in them travel along.
        python: minor version of the far machine, such as "3.12"; None: as here.
        part_mib: largest part.

    Raises:
        UsageError: for an argument that is not allowed, or packages that cannot be had.
        SourceError: if the built-in source is not installed.
        BundleError: if the student is there already.
        TrainingError: if a file cannot be read.
    """
    if part_mib * 2**20 < 2 * PIECE:
        raise UsageError(f"parts of {part_mib} MiB given; allowed: 8 or more")
    student, rest = _student(arguments)
    refuse_existing(student, force=False, kind="student")
    there, inputs = _moved(rest)
    version = python or HERE
    run = student.with_name(f"{student.name}.run")
    checkpoint = newest(run)
    history = [] if checkpoint is None else [run / FILE, checkpoint]
    places: Places = {}
    files = [_entry(*pair, places) for pair in [(archive(version), SOFTWARE), *inputs]]
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        name=student.name,
        python=version,
        arguments=tuple(there),
        files=tuple(files),
        run=tuple(_entry(file, f"{run.name}/{file.name}", places) for file in history),
        parts=_parts(places, part_mib * 2**20),
    )
    for name, pieces in plan.parts.items():
        _write_part(folder / name, pieces, places)
    for old in set(folder.glob("part-*.zip")) - {folder / name for name in plan.parts}:
        old.unlink()
    write_burst(folder / BURST, plan)
    return plan


def _student(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The student's directory, and the other arguments, each option apart from its value."""
    rest: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        rest += [option, value] if argument.startswith("--") and equals else [argument]
    given = [argument for argument in rest if argument in OURS]
    if given:
        raise UsageError(f"{given[0]} given; a burst decides on that itself: leave it out")
    outputs = [number for number, argument in enumerate(rest) if argument in ("-o", "--output")]
    if len(outputs) != 1 or not 0 < outputs[0] < len(rest) - 1:
        raise UsageError("give the arguments of `edgekit distill`: -- SOURCE -o STUDENT ...")
    student = Path(os.path.realpath(rest[outputs[0] + 1]))
    return student, rest[: outputs[0]] + rest[outputs[0] + 2 :]


def _moved(arguments: Sequence[str]) -> tuple[list[str], Files]:
    """Arguments with the names that files have there, and the files, the source first."""
    moved, files = [], Files()
    for number, argument in enumerate(arguments):
        plain = plain_name(argument)
        name = f"inputs/{number}/{Path(plain).name}"
        found = _files(plain, name)
        if not found and number == 0:
            files += _built_in(argument)
        files += found
        moved.append(name + argument[len(plain) :] if found else argument)
    return moved, files


def _files(argument: str, name: str) -> Files:
    """The file, or those of the model, that an argument names; none if it names neither."""
    path = Path(argument)
    if path.is_file():
        return [(path, name)]
    if any((path / model).is_file() for model in MODELS):
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        return [(file, f"{name}/{file.relative_to(path).as_posix()}") for file in inside]
    if argument.startswith(DATASETS) or path.suffix in SUFFIXES:
        raise UsageError(f"{argument}: no such file here, and a burst has no network")
    return []


def _built_in(source: str) -> Files:
    if source.lower() not in BUILT_IN:
        known = ", ".join(BUILT_IN)
        raise UsageError(
            f"{source!r} given; allowed first: a model directory, a .gguf file or {known}"
        )
    file = locate_built_in(source.lower())
    return [(file, f"built-in/{BUILT_IN[source.lower()].package}/{file.name}")]


def _entry(file: Path, path: str, places: Places) -> Entry:
    """The record of a file; `places` learns where its pieces are."""
    names, offset = [], 0
    for name, data in cut(file, PIECE):
        places.setdefault(name, (file, offset, len(data)))
        names.append(name)
        offset += len(data)
    return Entry(path=path, pieces=tuple(names))


def _parts(places: Places, limit: int) -> dict[str, tuple[str, ...]]:
    """Pieces in their order, as many to a part as fit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (_, _, size) in places.items():
        if filled + size + OVERHEAD > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size + OVERHEAD
    return {f"part-{number}.zip": tuple(group) for number, group in enumerate(groups, 1)}


def _write_part(out: Path, pieces: Sequence[str], places: Places) -> None:
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(out) as old:
        if tuple(old.namelist()) == tuple(pieces):
            return
    _write_zip(out, ((name, _contents(*places[name])) for name in pieces), zipfile.ZIP_STORED)


def _contents(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def write_burst(out: Path, plan: Plan) -> None:
    """Write what starts a burst: edgekit's own code and the plan, to be run by Python."""
    root = Path(edgekit.__file__).parent
    members = [("__main__.py", ENTRANCE.encode()), ("plan.json", json.dumps(dump(plan)).encode())]
    for folder, _, names in sorted(os.walk(root, followlinks=True)):
        paths = [Path(folder) / name for name in sorted(names) if name.endswith(SOURCES)]
        members += [
            (f"edgekit/{path.relative_to(root).as_posix()}", path.read_bytes()) for path in paths
        ]
    _write_zip(out, members, zipfile.ZIP_DEFLATED)


def _write_zip(out: Path, members: Iterable[tuple[str, bytes]], compression: int) -> None:
    part = out.with_suffix(".part")
    with zipfile.ZipFile(part, "w") as target:
        for name, data in members:
            target.writestr(zipfile.ZipInfo(name), data, compression)
    os.replace(part, out)
