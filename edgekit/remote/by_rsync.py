"""The rest of files sent by rsync, where both sides have one that can."""

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from edgekit.remote.device import LOST, Device

__all__ = ["send_by_rsync"]

UNABLE = (1, 2, 4)  # exit codes: an unknown option, another protocol, something not supported
CUT = (10, 12, 20, 30, 35, LOST)


def send_by_rsync(
    device: Device,
    source: Path,
    names: Iterable[str],
    partial: str,
    tell: Callable[[float], object],
) -> bool:
    """Append what is missing of files; what is there of them must be their beginning.

    Args:
        device: where to.
        source: the directory here.
        names: of the files, relative to it.
        partial: the directory there.
        tell: called with how much of the whole is there, 0 to 1.

    Returns:
        False if rsync is missing on a side, or one of the two cannot do it.

    Raises:
        EngineError: if the copy fails.
    """
    if not (device.has_rsync and shutil.which("rsync")):
        return False
    with tempfile.NamedTemporaryFile() as listed, tempfile.TemporaryFile("w+") as told:
        listed.write("\0".join(f"./{name}" for name in names).encode())  # "#..." is a comment
        listed.flush()
        code = _rsync(_command(device, source, listed.name, partial), told, tell)
        told.seek(0)
        if code and code not in UNABLE:
            first = told.read().strip().partition("\n")[0]  # the last line says less
            raise device.failed("the copy failed", first, LOST if code in CUT else code)
    return code == 0


def _command(device: Device, source: Path, listed: str, partial: str) -> list[str]:
    user, at, name = device.host.rpartition("@")
    host = f"{user}{at}[{name}]" if ":" in name else device.host
    return [
        "rsync", "--append", "--copy-links", "--protect-args", "--from0", f"--files-from={listed}",
        "--info=progress2", "--outbuf=L", "-e", shlex.join(device.ssh),
        f"{source}/", f"{host}:{partial}/",
    ]  # fmt: skip


def _rsync(command: Sequence[str], told: IO[str], tell: Callable[[float], object]) -> int:
    """The exit code; text mode makes lines of the progress, which ends in carriage returns."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=told, text=True
    ) as process:
        try:
            for line in process.stdout or ():
                if percent := re.search(r"(\d+)%", line):
                    tell(int(percent[1]) / 100)
            return process.wait()
        except BaseException:
            process.terminate()
            raise
