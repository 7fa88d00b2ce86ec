"""Directories that appear whole or not at all: bundles, students, adapters, models.

One is written to a hidden sibling and renamed when whole, so a reader never sees half of it.
"""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from edgekit.errors import BundleError

__all__ = ["MARKERS", "refuse_existing", "remove_abandoned", "staged", "workspace"]

MARKERS = {  # the file that tells what a directory is
    "bundle": "edgekit.json",
    "student": "student.json",
    "adapter": "adapter_config.json",
    "model": "config.json",
}
Kind = Literal["bundle", "student", "adapter", "model"]
PARTIAL, OLD = ".edgekit-partial", ".edgekit-old"  # endings of siblings that live during a write


@contextlib.contextmanager
def staged(out: Path | str, *, force: bool = False, kind: Kind = "bundle") -> Iterator[Path]:
    """A directory to fill; it becomes `out` when the block ends well and vanishes otherwise.

    What an earlier run left because it was killed is put right first. A link at `out` is followed.

    Args:
        out: the directory to make; missing parents are made, and removed again on failure.
        force: replace an existing directory of this kind (never any other directory).
        kind: what is being written, which `MARKERS` tell apart.

    Raises:
        BundleError: if `out` exists and may not be replaced, or cannot be written.
    """
    final = Path(os.path.realpath(out))  # the work must lie on the disk that it is renamed on
    with contextlib.ExitStack() as undo:
        try:
            _recover(final)
            refuse_existing(final, force, kind)
            undo.callback(_remove_empty, _missing(final.parent))
            final.parent.mkdir(parents=True, exist_ok=True)
            work = undo.enter_context(workspace(final))
            yield work
            work.chmod(0o755)
            _flush(work)
            refuse_existing(final, force, kind)
            _swap(work, final)
        except OSError as cause:
            raise BundleError(
                f"{out}: could not be written ({_reason(cause)}); nothing changed"
            ) from cause


@contextlib.contextmanager
def workspace(final: Path) -> Iterator[Path]:
    """A hidden sibling of `final` to fill and rename; removed at the end if it is still there.

    It is locked meanwhile, so that `remove_abandoned` can tell it from what a killed run left.

    Args:
        final: what the caller renames it to; its parent exists.

    Raises:
        OSError: if it cannot be made.
    """
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=PARTIAL, dir=final.parent))
    lock = _claim(work)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove the workspaces in `folder` that a killed run left.

    Args:
        folder: where they lie; it need not exist.
        name: of what they were to become; empty for all.
    """
    prefix = f".{glob.escape(name)}." if name else "."
    for partial in folder.glob(f"{prefix}*{PARTIAL}"):
        lock = _claim(partial)
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _reason(cause: OSError) -> str:
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    if isinstance(cause, FileExistsError | NotADirectoryError):
        return "a part of the path is no directory"
    about = f": {Path(os.fsdecode(cause.filename)).name}" if cause.filename else ""
    return f"{cause.strerror}{about}" if cause.strerror else str(cause)


def _missing(directory: Path) -> list[Path]:
    """`directory` and its parents, as far as they do not exist, deepest first."""
    return [path for path in (directory, *directory.parents) if not os.path.lexists(path)]


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        with contextlib.suppress(OSError):
            path.rmdir()


def refuse_existing(out: Path, force: bool, kind: str) -> None:
    """Fail early where `staged` would fail at the end of long work.

    Raises:
        BundleError: if `out` exists and may not be replaced.
    """
    if not os.path.lexists(out):
        return
    if out.is_mount():
        raise BundleError(f"{out}: is a mount point; choose the name of a directory in it")
    if not force:
        raise BundleError(
            f"{out}: exists already; choose another name or pass --force to replace it"
        )
    if not (out.is_dir() and ((out / MARKERS[kind]).is_file() or not any(out.iterdir()))):
        raise BundleError(f"{out}: is not an edgekit {kind}, so --force will not replace it")


def _claim(directory: Path) -> int | None:
    """Lock `directory` until the returned descriptor is closed or this process ends.

    The kernel lets go of it even after SIGKILL, and a process in another container cannot be
    mistaken for ours, as with a process id.

    Returns:
        None if another process holds it or removed it, or where the file system has no locks.
    """
    import fcntl  # not on Windows, where this module is read but nothing is staged

    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _recover(out: Path) -> None:
    """Undo what a killed run left: its partial directory, or an old bundle set aside."""
    old = _aside(out)
    if old.is_dir() and not os.path.lexists(out):
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    remove_abandoned(out.parent, out.name)


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}{OLD}"


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _swap(work: Path, out: Path) -> None:
    old = _aside(out)
    if os.path.lexists(out):
        out.rename(old)
    try:
        work.rename(out)
    finally:
        if old.is_dir() and not os.path.lexists(out):
            old.rename(out)
    shutil.rmtree(old, ignore_errors=True)
