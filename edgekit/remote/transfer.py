"""Directories copied to a device: whole or not at all, and on from where an earlier copy was cut.

A directory is known there by the hash of its files' records, so one that has not changed is not
copied again. Until it is whole it lies beside in a `.partial` directory. What is there of a file is
kept if it has the sha256 of as many first bytes here; only the rest is sent.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit import config
from edgekit.bundle import MANIFEST, FileRecord, check_files, read_manifest
from edgekit.errors import EngineError
from edgekit.remote.by_append import send_by_append
from edgekit.remote.by_rsync import send_by_rsync
from edgekit.remote.device import Device

__all__ = ["Copied", "Progress", "content_key", "copy_bundle", "copy_directory"]

Progress = Callable[[str, int, int], object]
BLOCK = 1 << 20
MEGA = 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """Where a directory lies there, the bytes sent for it now and those that were there before."""

    path: str
    sent: int
    kept: int


def copy_bundle(device: Device, bundle: Path, progress: Progress) -> Copied:
    """Copy a bundle under its own name; raises what `check_files` and `copy_directory` do."""
    manifest = read_manifest(bundle)
    own = (bundle / MANIFEST).read_bytes()
    record = FileRecord(size=len(own), sha256=hashlib.sha256(own).hexdigest())
    files = {**manifest.files, MANIFEST: record}
    whole = f"{device.cache}/bundles/{content_key(files)}/{bundle.resolve().name}"
    return copy_directory(
        device, bundle, files, whole, progress, lambda: check_files(bundle, manifest)
    )


def content_key(files: Mapping[str, FileRecord]) -> str:
    """A short name for what the files hold."""
    records = json.dumps(config.dump(files), sort_keys=True)
    return hashlib.sha256(records.encode()).hexdigest()[:16]


def copy_directory(
    device: Device,
    source: Path,
    files: Mapping[str, FileRecord],
    whole: str,
    progress: Progress,
    check: Callable[[], object] = lambda: None,
) -> Copied:
    """Make the files of `source` be in the directory `whole` there.

    Args:
        device: where to.
        source: the directory here.
        files: records by name, relative to `source`.
        whole: the path there, in a directory that is named by the content.
        progress: called with a name, the megabytes that are there and those of the whole.
        check: called before anything is sent, and not if nothing is.

    Raises:
        EngineError: if there is too little space or the copy fails; another goes on from there.
    """
    partial = f"{whole.rpartition('/')[0]}.partial"
    found = device.ask("begin", partial, whole)
    total = sum(record.size for record in files.values())
    if found["whole"]:
        return Copied(path=whole, sent=0, kept=total)
    kept = {
        name: file["size"]
        for name, file in found["files"].items()
        if name in files and _begins_with(source / name, **file)
    }
    missing = total - sum(kept.values())
    _check_space(device, source, missing, found["free"])
    check()
    device.ask("keep", partial, given=list(kept))
    _send(device, source, files, kept, partial, progress)
    device.ask("finish", partial, whole, given={name: r.sha256 for name, r in files.items()})
    return Copied(path=whole, sent=missing, kept=total - missing)


def _begins_with(path: Path, size: int, sha256: str) -> bool:
    """Whether the first `size` bytes of a file have this sha256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (block := file.read(min(size, BLOCK))):
            digest.update(block)
            size -= len(block)
    return not size and digest.hexdigest() == sha256


def _check_space(device: Device, source: Path, missing: int, free: int) -> None:
    if missing > free:
        raise EngineError(
            f"{device.host}: {source.name} needs {missing / MEGA:.1f} MB there, but only "
            f"{free / MEGA:.1f} MB are free; make room: {device.cache} has what was copied before"
        )


def _send(
    device: Device,
    source: Path,
    files: Mapping[str, FileRecord],
    kept: Mapping[str, int],
    partial: str,
    progress: Progress,
) -> None:
    """By rsync if it can, or else without."""
    name = f"copy {source.name} to {device.host}"
    count = max(1, sum(record.size for record in files.values()) // MEGA)

    def tell(part: float) -> None:
        progress(name, min(int(part * count), count - 1), count)

    if not send_by_rsync(device, source, files, partial, tell):
        sizes = {name: record.size for name, record in files.items()}
        send_by_append(device, source, sizes, kept, partial, tell)
