"""A burst, on the far machine: `python3 burst.pyz WORK [PART ...] [--out OUT]`.

Starts with the standard library alone and leaves everything below WORK.
"""

import argparse
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
from edgekit.distill.burst.pieces import Entry, Plan, Result, cut, join, keep, newest
from edgekit.errors import EdgekitError, TrainingError

__all__ = ["RESULT", "main"]

RESULT = "burst.json"
PIECE = 16 * 2**20
METRICS = "metrics.jsonl"


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
    with zipfile.ZipFile(package) as archive:
        plan = load(Plan, json.loads(archive.read("plan.json")), where=str(package))
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if plan.python != here:
        raise TrainingError(
            f"packed for Python {plan.python}, this is {here}; pack --python {here}"
        )
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
        code = _train(
            plan, work, environment, args.seconds - (time.monotonic() - started), args.grace
        )
    _deliver(plan, work, args.out)
    return code


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
    digest = plan.files[0].pieces[0][:16]
    site, code = work / f"site-{digest}", work / "code"
    if not site.is_dir():
        _unpack(work / plan.files[0].path, site)
    shutil.rmtree(code, ignore_errors=True)
    _unpack(package, code)
    have = newest(work / f"{plan.name}.run")
    if plan.run and (have is None or have.name < Path(plan.run[-1].path).name):
        for entry in plan.run:
            join(entry, store, work)
    paths = os.pathsep.join(map(str, (code, site, work / "built-in")))
    return {"PYTHONPATH": paths, "EDGEKIT_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}


def _unpack(archive: Path, folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with zipfile.ZipFile(archive) as source:
        source.extractall(part)
    os.replace(part, folder)


def _train(plan: Plan, work: Path, environment: dict[str, str], seconds: float, grace: int) -> int:
    left = max(1, int(seconds))
    command = [sys.executable, "-P", "-m", "edgekit", "distill", *plan.arguments, "-o", plan.name]
    command += ["--resume", "--stop-after", str(left)]
    with subprocess.Popen(command, cwd=work, env={**os.environ, **environment}) as child:
        try:
            return int(child.wait(timeout=left + grace) != 0)
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
        raise TrainingError(
            "the run left no checkpoint; if it told no error, give it more --seconds"
        )
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for file in files:
        names = []
        for name, data in cut(file, PIECE):
            keep(name, data, out)
            names.append(name)
        entries.append(Entry(path=file.name, pieces=tuple(names)))
    result = Result(name=plan.name, finished=student.is_dir(), files=tuple(entries))
    part = out / f"{RESULT}.part"
    part.write_text(json.dumps(dump(result)), encoding="utf-8")
    os.replace(part, out / RESULT)
    _remove_others(out, {name for entry in entries for name in entry.pieces})


def _remove_others(out: Path, names: set[str]) -> None:
    """Remove the pieces of an earlier burst."""
    for file in out.iterdir():
        if len(file.name) == 64 and file.name not in names:
            file.unlink()
