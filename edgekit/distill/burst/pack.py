"""Before a burst: everything that the far machine lacks, in parts."""

import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import edgekit
from edgekit.config import dump
from edgekit.data.documents import DATASETS, TEXT_ENDINGS
from edgekit.distill.burst.pieces import Entry, Plan, cut, newest
from edgekit.distill.burst.software import HERE, archive
from edgekit.distill.metrics import FILE
from edgekit.errors import UsageError
from edgekit.sources.builtin import BUILT_IN, locate_built_in

__all__ = ["BURST", "pack"]

BURST = "burst.pyz"
PIECE = 4 * 2**20
ENTRANCE = "from edgekit.distill.burst.train import main\n\nraise SystemExit(main())\n"
SOURCES = (".py", ".toml", ".txt")  # of edgekit's own files
FILES = (*TEXT_ENDINGS, ".jsonl", ".toml")
MODELS = ("config.json", "student.json")  # in a directory that is a source or a student
OURS = ("--resume", "--force", "--stop-after")
Files = list[tuple[Path, str]]  # a file here, and its path there


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
        TrainingError: if a file cannot be read.
    """
    if part_mib * 2**20 < 2 * PIECE:
        raise UsageError(f"parts of {part_mib} MiB given; allowed: 8 or more")
    student, rest = _student(arguments)
    there, inputs = _moved(rest)
    version = python or HERE
    run = student.with_name(f"{student.name}.run")
    checkpoint = newest(run)
    history = [] if checkpoint is None else [run / FILE, checkpoint]
    places: dict[str, tuple[Path, int]] = {}
    files = [_entry(*pair, places) for pair in [(archive(version), "software.zip"), *inputs]]
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
    _write_burst(folder / BURST, plan)
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
    if len(outputs) != 1 or outputs[0] + 1 == len(rest):
        raise UsageError("give the arguments of `edgekit distill`: -- SOURCE -o STUDENT ...")
    student = Path(os.path.realpath(rest[outputs[0] + 1]))
    return student, rest[: outputs[0]] + rest[outputs[0] + 2 :]


def _moved(arguments: list[str]) -> tuple[list[str], Files]:
    """Arguments with the names that files have there, and the files."""
    source = arguments[0] if arguments else ""
    if not Path(source).exists() and source.lower() not in BUILT_IN:
        known = ", ".join(BUILT_IN)
        raise UsageError(
            f"source {source!r} given; allowed first: a model directory, a .gguf file or {known}"
        )
    moved, files = list(arguments), Files()
    for number, argument in enumerate(arguments):
        path, name = Path(argument), f"inputs/{number}/{Path(argument).name}"
        if argument.startswith(DATASETS):
            raise UsageError(f"{argument}: not to be had without a network; give a .jsonl file")
        if path.is_file():
            files.append((path, name))
        elif any((path / model).is_file() for model in MODELS):
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            files += [(file, f"{name}/{file.relative_to(path).as_posix()}") for file in inside]
        elif number == 0:
            file = locate_built_in(source.lower())
            files.append((file, f"built-in/{BUILT_IN[source.lower()].package}/{file.name}"))
            continue
        elif path.suffix in FILES:
            raise UsageError(f"{argument}: no such file")
        else:
            continue
        moved[number] = name
    return moved, files


def _entry(file: Path, path: str, places: dict[str, tuple[Path, int]]) -> Entry:
    """The record of a file; `places` learns where its pieces are: in which file, which one."""
    names = [name for name, _ in cut(file, PIECE)]
    for number, name in enumerate(names):
        places.setdefault(name, (file, number))
    return Entry(path=path, pieces=tuple(names))


def _parts(places: Mapping[str, tuple[Path, int]], limit: int) -> dict[str, tuple[str, ...]]:
    """Pieces in their order, as many to a part as surely fit."""
    each = (limit - PIECE // 4) // PIECE  # what a zip adds is far less than that quarter
    names = list(places)
    groups = [names[first : first + each] for first in range(0, len(names), each)]
    return {f"part-{number}.zip": tuple(group) for number, group in enumerate(groups, 1)}


def _write_part(out: Path, pieces: Sequence[str], places: Mapping[str, tuple[Path, int]]) -> None:
    try:
        with zipfile.ZipFile(out) as old:
            if tuple(old.namelist()) == tuple(pieces):
                return
    except (OSError, zipfile.BadZipFile):
        pass  # not there, or not whole
    _write_zip(out, ((name, _contents(*places[name])) for name in pieces), zipfile.ZIP_STORED)


def _contents(file: Path, number: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(number * PIECE)
        return stream.read(PIECE)


def _write_burst(out: Path, plan: Plan) -> None:
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
