"""Writing a bundle: whole, or as if nothing had happened, even when killed."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit import staging
from edgekit.bundle import MANIFEST
from edgekit.errors import BundleError
from edgekit.staging import staged

Step = Callable[[Path], object]


def fill(directory: Path, content: str = "weights") -> None:
    """Three files whose contents say `content`, the manifest last."""
    (directory / "part").mkdir(parents=True)
    (directory / "model.onnx").write_text(content * 100)
    (directory / "part" / "extra.bin").write_text(content)
    (directory / MANIFEST).write_text(content)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A name that is free, in a directory of its own."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "out"


def made(
    out: Path, content: str = "weights", *, force: bool = False, last: Step = lambda work: None
) -> Path:
    """Write a bundle; `last` is called with the unfinished one."""
    with staged(out, force=force) as work:
        fill(work, content)
        last(work)
    return out


def failing(error: BaseException) -> Step:
    def fail(work: Path) -> None:
        assert (work / MANIFEST).is_file()
        raise error

    return fail


def siblings(out: Path) -> list[str]:
    return sorted(os.listdir(out.parent))


def test_a_bundle_appears_whole(out: Path) -> None:
    with staged(out) as work:
        assert not out.exists()
        assert work.parent == out.parent  # else the rename would be a copy
        fill(work)
    assert_whole(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert siblings(out) == ["out"]


@pytest.mark.parametrize("error", [ValueError, BundleError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_a_failure_leaves_things_as_they_were(
    out: Path, error: type[BaseException], force: bool
) -> None:
    if force:
        made(out, "old")
    with pytest.raises(BundleError if error is OSError else error, match="stop"):
        made(out, "new", force=force, last=failing(error("stop")))
    assert siblings(out) == (["out"] if force else [])
    if force:
        assert (out / "part" / "extra.bin").read_text() == "old"


def test_force_replaces_a_bundle_and_an_empty_directory(out: Path) -> None:
    out.mkdir()
    made(out, "first", force=True)
    made(out, "second", force=True)
    assert (out / "part" / "extra.bin").read_text() == "second"
    assert siblings(out) == ["out"]


def directory_of_mine(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


def file_of_mine(out: Path) -> None:
    out.write_text("years of work")


def link_to_mine(out: Path) -> None:
    directory_of_mine(out.parent / "mine")
    out.symlink_to("mine")


@pytest.mark.parametrize("make", [directory_of_mine, file_of_mine, link_to_mine])
def test_what_is_no_bundle_is_never_replaced(out: Path, make: Callable[[Path], None]) -> None:
    make(out)
    before = siblings(out)
    with pytest.raises(BundleError, match=r"exists already; .* --force"), staged(out):
        pytest.fail("entered")
    with pytest.raises(BundleError, match="is not an edgekit bundle, so --force will not"):
        made(out, force=True)
    assert siblings(out) == before


def test_what_appears_meanwhile_is_not_replaced(out: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        made(out, last=lambda work: directory_of_mine(out))
    assert (out / "thesis.tex").exists()
    assert siblings(out) == ["out"]


def test_a_link_is_followed(out: Path) -> None:
    real = made(out.parent / "real", "old")
    out.symlink_to("real")
    made(out, "new", force=True)
    assert out.is_symlink()
    assert (real / "part" / "extra.bin").read_text() == "new"
    assert siblings(out) == ["out", "real"]


@pytest.mark.parametrize("spelling", ["{}/", "{}/.", "{}/../out"])
def test_spellings_of_the_same_name(out: Path, spelling: str) -> None:
    made(out, "old")
    with staged(spelling.format(out), force=True) as work:
        fill(work, "new")
    assert (out / "part" / "extra.bin").read_text() == "new"
    assert siblings(out) == ["out"]


def test_relative_names(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    with staged("out") as work:
        fill(work)
    with pytest.raises(BundleError, match="exists already"), staged(""):
        pytest.fail("entered")
    assert siblings(out) == ["out"]


def test_missing_parents_are_made_and_unmade(out: Path) -> None:
    deep = out / "a" / "b" / "bundle"
    with pytest.raises(ValueError, match="stop"):
        made(deep, last=failing(ValueError("stop")))
    assert siblings(out) == []
    made(deep)
    assert siblings(deep) == ["bundle"]


def test_parents_that_others_use_stay(out: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        made(out / "a" / "bundle", last=lambda work: directory_of_mine(out / "a" / "bundle"))
    assert siblings(out / "a") == ["a"]
    assert siblings(out / "a" / "bundle") == ["bundle"]


@pytest.mark.parametrize("below", ["bundle", "a/bundle"])
def test_below_a_file_nothing_can_be_written(out: Path, below: str) -> None:
    out.write_text("a file")
    with pytest.raises(BundleError, match=r"could not be written \(a part of the path is no"):
        made(out / below)
    assert siblings(out) == ["out"]


@pytest.mark.parametrize("name", ["out", "out[1]", "a*b?", "with space", "-o", "ünïcode"])
def test_leftovers_are_found_whatever_the_name(out: Path, name: str) -> None:
    out = out.with_name(name)
    stale = out.parent / f".{name}.x1y2{staging.PARTIAL}"
    fill(stale)
    made(out)
    assert siblings(out) == [name]


def test_only_our_leftovers_are_removed(out: Path) -> None:
    mine = [".out.partial", ".out.old", ".out.bak", f".other.x1y2{staging.PARTIAL}"]
    for name in mine:
        directory_of_mine(out.parent / name)
    made(out)
    made(out, force=True)
    assert siblings(out) == sorted([*mine, "out"])


def test_a_run_that_still_writes_is_left_alone(out: Path) -> None:

    def meanwhile(first: Path) -> None:
        made(out, "second")
        assert (first / MANIFEST).is_file()

    with pytest.raises(BundleError, match="exists already"):
        made(out, "first", last=meanwhile)
    assert (out / "part" / "extra.bin").read_text() == "second"
    assert siblings(out) == ["out"]


def test_killed_between_the_two_renames(out: Path) -> None:
    """The old bundle stands aside, the new one is not there yet: the old one comes back."""
    fill(staging._aside(out), "old")
    fill(out.parent / f".out.x1y2{staging.PARTIAL}", "new")
    with pytest.raises(BundleError, match="exists already"), staged(out):
        pytest.fail("entered")
    assert (out / "part" / "extra.bin").read_text() == "old"
    assert siblings(out) == ["out"]


def test_killed_after_the_second_rename(out: Path) -> None:
    fill(staging._aside(out), "old")
    made(out.parent / "elsewhere", "new").rename(out)
    made(out, "newer", force=True)
    assert (out / "part" / "extra.bin").read_text() == "newer"
    assert siblings(out) == ["out"]


def test_a_swap_that_fails_puts_the_old_bundle_back(out: Path) -> None:
    made(out, "old")
    with pytest.raises(FileNotFoundError):
        staging._swap(out.parent / "gone", out)
    assert (out / "part" / "extra.bin").read_text() == "old"
    assert siblings(out) == ["out"]


WRITE_FOREVER = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
from test_staged import made
from pathlib import Path
for n in itertools.count():
    made(Path(sys.argv[1]), f"{sys.argv[3]}-{n}.", force=True)
    if n == 0:
        print("ready", flush=True)
"""


def test_kills_at_any_moment_leave_a_whole_bundle(out: Path) -> None:
    """Writers that replace the bundle over and over, killed after odd times."""
    here = str(Path(__file__).parent)
    for round_ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(out), here, f"round{round_}"],
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.003 * round_)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        if out.exists():
            assert_whole(out)
        with pytest.raises(BundleError, match="exists already"), staged(out):
            pytest.fail("entered")
        assert_whole(out)
        assert (out / "part" / "extra.bin").read_text().startswith(f"round{round_}-")
        assert siblings(out) == ["out"]


def assert_whole(directory: Path) -> None:
    content = (directory / "part" / "extra.bin").read_text()
    assert (directory / "model.onnx").read_text() == content * 100
    assert (directory / MANIFEST).read_text() == content
