"""A burst, on the far machine: `python3 burst.pyz WORK [PART ...] [--out OUT]`.

Starts with the standard library alone and leaves everything below WORK.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from edgekit.config import dump, load
from edgekit.distill.burst.pieces import (
    SOFTWARE,
    Entry,
    Plan,
    Result,
    cut,
    join,
    keep,
    newest,
)
from edgekit.distill.metrics import FILE as METRICS
from edgekit.errors import EdgekitError, TrainingError

__all__ = ["RESULT", "main"]

RESULT = "burst.json"
PIECE = 15 * 2**20  # of what goes back: no file reaches 16 MiB
DIGITS = 64  # of a sha256 in hex


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `burst.pyz`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="burst.pyz", allow_abbrev=False)
    parser.add_argument("work", type=Path, metavar="WORK", help="folder for everything")
    parser.add_argument("parts", type=Path, nargs="*", metavar="PART", help="to receive")
    parser.add_argument("--out", type=Path, help="train, then leave what came of it here")
    parser.add_argument(
        "--seconds", type=int, default=540, metavar="N", help="then stop and save (default: 540)"
    )
    parser.add_argument(
        "--grace", type=int, default=45, metavar="N", help="more before a kill (default: 45)"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as batch systems announce the end
    try:
        return _burst(args, Path(sys.argv[0]).resolve(), time.monotonic())
    except EdgekitError as error:
        print(f"burst: error: {error}", file=sys.stderr)
        return error.exit_code


def _burst(args: argparse.Namespace, package: Path, started: float) -> int:
    plan = _plan(package)
    work = args.work.resolve()
    store = work / "pieces"
    store.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        _receive(part, store)
    have = {path.name for path in store.iterdir()}
    missing = ", ".join(name for name, pieces in plan.parts.items() if not have.issuperset(pieces))
    if args.out is None:
        print(f"burst: still to come: {missing}" if missing else "burst: all is here; give --out")
        return 0
    if missing:
        raise TrainingError(f"not received yet: {missing}")
    code = 0
    if not (work / plan.name).is_dir():
        environment = _prepare(plan, package, work, store)
        left = max(1, args.seconds - int(time.monotonic() - started))
        code = _train(plan, work, environment, left, args.grace)
    if not code or newest(work / f"{plan.name}.run"):
        _deliver(plan, work, args.out)
    return code


def _plan(package: Path) -> Plan:
    with zipfile.ZipFile(package) as archive:
        plan = load(Plan, json.loads(archive.read("plan.json")), where=str(package))
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if plan.python != here:
        raise TrainingError(f"packed for Python {plan.python}, here is {here}; use pack --python")
    return plan


def _receive(part: Path, store: Path) -> None:
    try:
        with zipfile.ZipFile(part) as archive:
            for name in archive.namelist():
                if not (store / name).is_file():
                    keep(name, archive.read(name), store)
    except (OSError, zipfile.BadZipFile) as cause:
        raise TrainingError(f"{part}: cannot be read ({cause}); copy it again") from cause


def _prepare(plan: Plan, package: Path, work: Path, store: Path) -> dict[str, str]:
    """Put files, packages and run in their places; returns the trainer's environment."""
    for entry in plan.files:
        join(entry, store, work)
    have = newest(work / f"{plan.name}.run")
    if plan.run and (have is None or have.name < Path(plan.run[-1].path).name):
        for entry in plan.run:
            join(entry, store, work)
    paths = [_unpacked(package, work), _unpacked(work / SOFTWARE, work), work / "built-in"]
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "EDGEKIT_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
    }


def _unpacked(archive: Path, work: Path) -> Path:
    """The folder with the contents of `archive`, made unless it is there."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder, part = work / f"unpacked-{digest}", work / f"unpacked-{digest}.part"
    if not folder.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        with zipfile.ZipFile(archive) as source:
            source.extractall(part)
        os.replace(part, folder)
    return folder


def _train(plan: Plan, work: Path, environment: dict[str, str], seconds: int, grace: int) -> int:
    """Run `edgekit distill`; returns 1 if it failed, and 0 if it ended or had to be ended."""
    command = [sys.executable, "-P", "-m", "edgekit", "distill", *plan.arguments, "-o", plan.name]
    command += ["--resume", "--stop-after", str(seconds)]
    with subprocess.Popen(command, cwd=work, env={**os.environ, **environment}) as child:
        try:
            return int(child.wait(timeout=seconds + grace) != 0)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            child.kill()  # the newest checkpoint is whole
            print("burst: cut short; what follows the last checkpoint is lost", file=sys.stderr)
            return 0


def _deliver(plan: Plan, work: Path, out: Path) -> None:
    """Cut the student, or records and newest checkpoint of its run, into `out`."""
    student, run = work / plan.name, work / f"{plan.name}.run"
    checkpoint = newest(run)
    if student.is_dir():
        files = sorted(student.iterdir())
    elif checkpoint is not None:
        files = [run / METRICS, checkpoint]
    else:
        raise TrainingError("there was no time for a checkpoint; give more --seconds")
    out.mkdir(parents=True, exist_ok=True)
    entries = tuple(_delivered(file, out) for file in files)
    result = Result(name=plan.name, finished=student.is_dir(), files=entries)
    part = out / f"{RESULT}.part"
    part.write_text(json.dumps(dump(result)), encoding="utf-8")
    os.replace(part, out / RESULT)
    names = {name for entry in entries for name in entry.pieces}
    for old in out.iterdir():  # of an earlier burst
        if len(old.name) == DIGITS and old.name not in names:
            old.unlink()


def _delivered(file: Path, out: Path) -> Entry:
    names = []
    for name, data in cut(file, PIECE):
        keep(name, data, out)
        names.append(name)
    return Entry(path=file.name, pieces=tuple(names))
