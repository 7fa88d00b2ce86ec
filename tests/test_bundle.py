"""The manifest's refusals, and writing that is whole or does not happen."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit import bundle
from edgekit.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    ModelFacts,
    StateRecord,
    check_files,
    describe_files,
    read_manifest,
    staged,
    write_manifest,
)
from edgekit.errors import BundleError

Change = Callable[[dict[str, Any]], object]
Step = Callable[[Path], object]

FACTS = ModelFacts(
    family="llama",
    vocab_size=320,
    num_layers=1,
    context_length=None,
    bos_token_id=1,
    eos_token_ids=(2, 3),
    pad_token_id=None,
    inputs=("input_ids", "attention_mask"),
)
STATE = StateRecord(
    layer=0,
    kind="ssm",
    openvino="cache_params.past.ssm.0",
    onnx=("past_key_values.0.recurrent_state", "present.0.recurrent_state"),
    shape=(-1, 4, 16, 24),
)


def fill(directory: Path, content: str = "weights") -> Manifest:
    """A bundle of two files whose contents say `content`; returns its manifest."""
    (directory / "part").mkdir(parents=True)
    (directory / "model.onnx").write_text(content * 100)
    (directory / "part" / "extra.bin").write_text(content)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source={"kind": "hf-directory", "name": "tiny"},
        model=FACTS,
        mixers=("lawcat",),
        states=(STATE,),
        weights="int4",
        engines=("onnx",),
        target="generic-x86",
        pipeline=({"step": "load", "notes": []},),
        versions={"edgekit": "0"},
        files=describe_files(directory),
        verification={"onnx": {"kl": 0.1}},
    )
    write_manifest(directory, manifest)
    return manifest


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


# ---- the manifest


def test_a_manifest_reads_back_equal(tmp_path: Path) -> None:
    manifest = fill(tmp_path / "b")
    assert read_manifest(tmp_path / "b") == manifest
    assert set(manifest.files) == {"model.onnx", "part/extra.bin"}
    assert manifest.constant_memory
    check_files(tmp_path / "b", manifest)


def test_fingerprint_follows_the_files_only(tmp_path: Path) -> None:
    first, same, other = (
        fill(tmp_path / name, text) for name, text in (("a", "x"), ("b", "x"), ("c", "y"))
    )
    assert first.fingerprint == same.fingerprint != other.fingerprint


def rewrite(directory: Path, change: Change) -> None:
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def names(name: str) -> Change:
    """A change that lists a file called `name`."""
    return lambda m: m["files"].update({name: {"size": 1, "sha256": "0"}})


REFUSED: dict[str, tuple[Change, str]] = {
    "parent": (names("../secret"), r"'\.\./secret' leads outside the bundle; refused"),
    "parent-within": (names("part/../../secret"), "leads outside the bundle"),
    "absolute": (names("/etc/passwd"), "'/etc/passwd' leads outside the bundle"),
    "backslash": (names("..\\secret"), "leads outside the bundle"),
    "empty": (names(""), "leads outside the bundle"),
    "itself": (names("."), "leads outside the bundle"),
    "nul": (names("a\0b"), "leads outside the bundle"),
    "version": (lambda m: m.update(format_version=2), "bundle format 2, this edgekit reads 1"),
    "no-version": (lambda m: m.pop("format_version"), "bundle format None"),
    "boolean": (lambda m: m.update(format_version=True), "expected int, got True"),
    "unknown": (lambda m: m.update(extra=1), "unknown key 'extra'; known: "),
    "unknown-within": (lambda m: m["model"].update(extra=1), "model: unknown key 'extra'"),
    "missing": (lambda m: m.pop("states"), "the key 'states' is missing"),
    "text-for-list": (lambda m: m.update(mixers="lawcat"), "mixers: expected a list"),
    "list-for-table": (lambda m: m.update(files=[["a", "b"]]), "files: expected a table"),
    "number-for-table": (lambda m: m["files"].update({"a": 3}), "a: expected a table, got 3"),
    "text-for-size": (
        lambda m: m["files"]["model.onnx"].update(size="700"),
        "model.onnx: size: expected int, got '700'",
    ),
    "float-for-int": (lambda m: m["model"].update(vocab_size=3.5), "expected int, got 3.5"),
    "state-kind": (lambda m: m["states"][0].update(kind="rnn"), "'rnn' given; allowed: conv"),
    "state-names": (lambda m: m["states"][0].update(onnx=["a"]), "expected 2 items, got 1"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_changed_manifest_is_refused(tmp_path: Path, change: Change, says: str) -> None:
    fill(tmp_path / "b")
    rewrite(tmp_path / "b", change)
    with pytest.raises(BundleError, match=says) as caught:
        read_manifest(tmp_path / "b")
    assert MANIFEST in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe{}", b"[" * 100_000],
    ids=["empty", "cut", "not-utf8", "deep"],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    fill(tmp_path / "b")
    (tmp_path / "b" / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=r"edgekit\.json: damaged .*; convert the model again"):
        read_manifest(tmp_path / "b")


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null"])
def test_a_manifest_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    fill(tmp_path / "b")
    (tmp_path / "b" / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="bundle format None"):
        read_manifest(tmp_path / "b")


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle directory"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"not an edgekit bundle \(edgekit\.json is missing\)"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("to", ["../secret", "/etc/hostname", "model.onnx"])
def test_links_may_not_lead_outside(tmp_path: Path, to: str) -> None:
    directory = tmp_path / "b"
    fill(directory)
    (tmp_path / "secret").write_text("x")
    (directory / "part" / "extra.bin").unlink()
    (directory / "part" / "extra.bin").symlink_to(
        f"../{to}" if to == "model.onnx" else tmp_path / "b" / to
    )
    if to == "model.onnx":
        read_manifest(directory)
        return
    with pytest.raises(BundleError, match="a link that leads outside the bundle; refused"):
        read_manifest(directory)


def test_a_link_that_leads_nowhere_is_missing(tmp_path: Path) -> None:
    manifest = fill(tmp_path / "b")
    (tmp_path / "b" / "model.onnx").unlink()
    (tmp_path / "b" / "model.onnx").symlink_to("model.onnx")
    assert read_manifest(tmp_path / "b") == manifest
    with pytest.raises(BundleError, match=r"model\.onnx: missing"):
        check_files(tmp_path / "b", manifest)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_flip, r"damaged \(its sha256 differs"),
        (damage_cut, r"damaged \(\d+ bytes, \d+ expected\)"),
        (Path.unlink, "missing"),
        (damage_into_directory, "missing"),
    ],
    ids=["flipped", "cut", "deleted", "directory"],
)
@pytest.mark.parametrize("name", ["model.onnx", "part/extra.bin"])
def test_a_damaged_file_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], says: str
) -> None:
    manifest = fill(tmp_path / "b")
    damage(tmp_path / "b" / name)
    with pytest.raises(BundleError, match=f"{name}: {says}"):
        check_files(tmp_path / "b", manifest)
    others = (other for other in manifest.files if other != name)
    check_files(tmp_path / "b", manifest, others)


def test_files_that_are_not_listed_are_no_part(tmp_path: Path) -> None:
    manifest = fill(tmp_path / "b")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    check_files(tmp_path / "b", manifest)
    with pytest.raises(BundleError, match=r"notes\.txt is not part of this bundle"):
        check_files(tmp_path / "b", manifest, iter(["notes.txt"]))


# ---- writing


def test_a_bundle_appears_whole(out: Path) -> None:
    with staged(out) as work:
        assert not out.exists()
        assert work.parent == out.parent  # else the rename would be a copy
        fill(work)
    check_files(out, read_manifest(out))
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
    stale = out.parent / f".{name}.x1y2{bundle.PARTIAL}"
    fill(stale)
    made(out)
    assert siblings(out) == [name]


def test_only_our_leftovers_are_removed(out: Path) -> None:
    mine = [".out.partial", ".out.old", ".out.bak", f".other.x1y2{bundle.PARTIAL}"]
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
    fill(bundle._aside(out), "old")
    fill(out.parent / f".out.x1y2{bundle.PARTIAL}", "new")
    with pytest.raises(BundleError, match="exists already"), staged(out):
        pytest.fail("entered")
    assert (out / "part" / "extra.bin").read_text() == "old"
    assert siblings(out) == ["out"]


def test_killed_after_the_second_rename(out: Path) -> None:
    fill(bundle._aside(out), "old")
    made(out.parent / "elsewhere", "new").rename(out)
    made(out, "newer", force=True)
    assert (out / "part" / "extra.bin").read_text() == "newer"
    assert siblings(out) == ["out"]


def test_a_swap_that_fails_puts_the_old_bundle_back(out: Path) -> None:
    made(out, "old")
    with pytest.raises(FileNotFoundError):
        bundle._swap(out.parent / "gone", out)
    assert (out / "part" / "extra.bin").read_text() == "old"
    assert siblings(out) == ["out"]


WRITE_FOREVER = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
from test_bundle import made
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
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    assert len(manifest.files) == 2
