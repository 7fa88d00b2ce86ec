"""Copies: whole or not at all, on from where they were cut, and never twice."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import FileRecord, read_manifest, write_manifest
from edgekit.errors import BundleError, EngineError
from edgekit.remote.device import connected
from edgekit.remote.transfer import Copied, copy_bundle

HOST = "127.0.0.1"
OVERHEAD = 100_000  # bytes of one connection beside the files: SSH's own, and the programs' text


def copy(bundle: Path, ssh: tuple[str, ...], steps: list[tuple[int, int]] | None = None) -> Copied:
    def progress(name: str, number: int, count: int) -> None:
        assert name == f"copy {bundle.name} to {HOST}"
        if steps is not None:
            steps.append((number, count))

    with connected(HOST, sys.executable, ssh) as device:
        return copy_bundle(device, bundle, progress)


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file, by its relative name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def total(bundle: Path) -> int:
    return sum(map(len, contents(bundle).values()))


def test_a_bundle_arrives_whole_and_once(
    server: Any, wire: Callable[..., Any], bundle: Path, way: str
) -> None:
    steps: list[tuple[int, int]] = []
    done = copy(bundle, server.ssh, steps)
    assert (done.sent, done.kept) == (total(bundle), 0)
    assert contents(Path(done.path)) == contents(bundle)
    assert Path(done.path).name == bundle.name
    assert steps == sorted(steps)
    assert len(steps) > 2
    link = wire(server)
    again = copy(bundle, server.through(link))
    assert again == replace(done, sent=0, kept=total(bundle))
    assert link.sent < OVERHEAD


def test_a_cut_copy_goes_on_where_it_was_cut(
    server: Any, wire: Callable[..., Any], bundle: Path, way: str
) -> None:
    with pytest.raises(EngineError, match="the connection was lost"):
        copy(bundle, server.through(wire(server, 9_000_000)))
    assert list(server.cache.glob("bundles/*.partial/#ballast.bin"))
    assert not list(server.cache.glob("bundles/*/*/edgekit.json"))
    link = wire(server)
    done = copy(bundle, server.through(link))
    assert done.kept > 0
    assert done.kept + done.sent == total(bundle)
    assert done.sent < link.sent < done.sent + OVERHEAD
    assert contents(Path(done.path)) == contents(bundle)
    assert not list(server.cache.glob("bundles/*.partial"))


def test_what_is_no_beginning_of_a_file_is_sent_again(server: Any, bundle: Path, way: str) -> None:
    done = copy(bundle, server.ssh)
    partial = Path(f"{Path(done.path).parent}.partial")
    Path(done.path).rename(partial)
    Path(done.path).parent.rmdir()
    (partial / "#ballast.bin").write_bytes(b"another beginning")
    (partial / "tokenizer.json").write_bytes(b"x" * 10**7)
    (partial / "left over").write_bytes(b"x")
    again = copy(bundle, server.ssh)
    changed = ("#ballast.bin", "tokenizer.json")
    assert again.sent == sum((bundle / name).stat().st_size for name in changed)
    assert contents(Path(again.path)) == contents(bundle)


def test_a_renamed_bundle_is_not_copied_again(server: Any, bundle: Path) -> None:
    before = copy(bundle, server.ssh)
    done = copy(bundle.rename(bundle.with_name("new name")), server.ssh)
    assert done.sent == 0
    assert Path(done.path).name == "new name"
    assert (Path(done.path) / "edgekit.json").is_file()
    assert not Path(before.path).exists()


def test_a_damaged_bundle_is_not_sent(server: Any, wire: Callable[..., Any], bundle: Path) -> None:
    ballast = bundle / "#ballast.bin"
    ballast.write_bytes(bytes(ballast.stat().st_size))
    link = wire(server)
    with pytest.raises(BundleError, match=r"#ballast\.bin: damaged"):
        copy(bundle, server.through(link))
    assert link.sent < OVERHEAD


def test_too_little_space_is_known_before(
    server: Any, wire: Callable[..., Any], bundle: Path
) -> None:
    manifest = read_manifest(bundle)
    huge = FileRecord(size=2**60, sha256=64 * "0")
    write_manifest(bundle, replace(manifest, files={**manifest.files, "#ballast.bin": huge}))
    link = wire(server)
    with pytest.raises(EngineError, match=r"needs 11529215\d+\.\d MB there, but only \d+\.\d MB"):
        copy(bundle, server.through(link))
    assert link.sent < OVERHEAD


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("way", ["append"], indirect=True)
def test_a_disk_that_fills_up(server: Any, bundle: Path, way: str) -> None:
    """What the kernel says of a full disk, by the device that is always full."""
    whole = Path(copy(bundle, server.ssh).path)
    partial = Path(f"{whole.parent}.partial")
    whole.rename(partial)
    whole.parent.rmdir()
    (partial / "#ballast.bin").unlink()
    (partial / "#ballast.bin").symlink_to("/dev/full")
    with pytest.raises(EngineError, match=r"the disk there is full \(.*No space left on device"):
        copy(bundle, server.ssh)


def test_rsync_that_cannot_is_done_without(start_server: Callable[..., Any], bundle: Path) -> None:
    """Such as through a shell that prints something first, which rsync does not understand."""
    noisy = start_server('ForceCommand echo welcome; eval "$SSH_ORIGINAL_COMMAND"')
    done = copy(bundle, noisy.ssh)
    assert contents(Path(done.path)) == contents(bundle)
