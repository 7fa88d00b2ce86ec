"""What runs on the device: sent as text to its Python, so that nothing need be installed there.

    python3 -I -c TEXT-OF-THIS-FILE VERB WORD...

It imports the standard library alone. A verb prints JSON, or what the program that it runs prints.
"""

import hashlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from io import BufferedReader
from pathlib import Path
from typing import IO

__all__ = ["START", "VERBS"]

START = "edgekit begins here"  # a shell's start-up files may print before it
BLOCK = 1 << 20
GRACE = 5.0  # seconds between asking a program to end and ending it
QUIET = 1.0  # seconds after which a copy that was cut has surely written what had come
SILENCE = 60.0  # seconds without a word from the other side, which says one every few
MARKER = "edgekit-ready.json"


def facts() -> None:
    """Where edgekit keeps things, and what is installed."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = os.environ.get("EDGEKIT_CACHE") or f"{base}/edgekit"
    folder = Path(cache).expanduser().absolute() / "remote"
    folder.mkdir(parents=True, exist_ok=True)
    pip = importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")
    _say({"cache": str(folder), "rsync": bool(shutil.which("rsync")), "venv": bool(pip)})


def lock(path: str) -> None:
    """Hold a lock until the other side is gone; the kernel frees it however this process ends."""
    import fcntl  # not on Windows, where this file is read but never runs

    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("another edgekit is at work there; two would disturb each other")
        _say("locked")
        _until_gone()


def begin(partial: str, whole: str) -> None:
    """What is there of a directory, and how much space is free for the rest.

    Only the last part of `whole` is the user's name for it; where that changed, it is renamed.
    """
    for named in Path(whole).parent.glob("*"):
        named.rename(whole)
    Path(partial).mkdir(parents=True, exist_ok=True)
    files = {
        name: {"size": size, "sha256": _sha256(Path(partial) / name)}
        for name, size in _settled(partial).items()
    }
    free = shutil.disk_usage(partial).free
    _say({"whole": Path(whole).is_dir(), "free": free, "files": files})


def _settled(partial: str) -> dict[str, int]:
    """The files' sizes, once nothing writes to them any more."""
    before, sizes = None, _sizes(partial)
    while sizes and sizes != before:
        time.sleep(QUIET)
        before, sizes = sizes, _sizes(partial)
    return sizes


def _sizes(partial: str) -> dict[str, int]:
    files = (path for path in Path(partial).rglob("*") if path.is_file())
    return {str(path.relative_to(partial)): path.stat().st_size for path in files}


def keep(partial: str) -> None:
    """Remove every file that the input does not name."""
    names = json.load(sys.stdin)
    for name in _sizes(partial):
        if name not in names:
            (Path(partial) / name).unlink()


def receive(partial: str) -> None:
    """Append what comes: a line of JSON with name and size, so many bytes, the next line."""
    with open(0, "rb", closefd=False) as data:
        while (line := data.readline()).endswith(b"\n"):
            header = json.loads(line)
            path = Path(partial) / header["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                _append(data, file, header["size"])


def _append(data: BufferedReader, file: IO[bytes], size: int) -> None:
    """Copy `size` bytes as they come, or those that come before the connection is cut."""
    while size and (block := data.read1(min(size, BLOCK))):
        file.write(block)
        size -= len(block)


def finish(partial: str, whole: str) -> None:
    """Check the files against the sha256 in the input, then move them into place at once."""
    for name, sha256 in json.load(sys.stdin).items():
        path = Path(partial) / name
        if not path.is_file() or _sha256(path) != sha256:
            path.unlink(missing_ok=True)
            sys.exit(f"{name} did not arrive as it was sent; run the command again")
        with path.open("rb") as file:
            os.fsync(file.fileno())
    Path(whole).parent.mkdir(parents=True, exist_ok=True)
    Path(partial).rename(whole)


def environment(folder: str, wheel: str, *engines: str) -> None:
    """Whether a virtual environment is `ready`, `other` (to be brought up to date) or `missing`."""
    try:
        marker = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        marker = {}
    if marker.get("python") != sys.version:
        _say("missing")
        return
    same = marker["wheel"] == wheel and set(engines) <= set(marker["engines"])
    _say("ready" if same else "other")


def unready(folder: str) -> None:
    """Say that a virtual environment is being changed."""
    (Path(folder) / MARKER).unlink(missing_ok=True)


def ready(folder: str, wheels: str, wheel: str, *engines: str) -> None:
    """Say that a virtual environment is whole; the wheels that it was made from may go."""
    marker = {"python": sys.version, "wheel": wheel, "engines": engines}
    (Path(folder) / MARKER).write_text(json.dumps(marker), encoding="utf-8")
    shutil.rmtree(wheels, ignore_errors=True)


def run(*command: str) -> None:
    """Run a program; it and all that it started are stopped when the other side is gone."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_stop_in_time, args=(child,), daemon=True).start()
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


def _stop_in_time(child: subprocess.Popen[bytes]) -> None:
    _until_gone()
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)


def _until_gone() -> None:
    """Wait for the end of the input, or for silence: a network that fails may not end it."""
    while select.select([0], [], [], SILENCE)[0] and os.read(0, BLOCK):
        pass


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


VERBS = {
    verb.__name__: verb
    for verb in (facts, lock, begin, keep, receive, finish, environment, unready, ready, run)
}

if __name__ == "__main__":
    print(START, flush=True)
    try:
        VERBS[sys.argv[1]](*sys.argv[2:])
    except OSError as error:
        sys.exit(f"{error.filename or 'writing'}: {error.strerror}")
