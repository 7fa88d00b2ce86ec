"""A full disk and a killed process: OUT is what it was, and the next convert works."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import MANIFEST, check_files, read_manifest
from edgekit.cli.main import main
from edgekit.errors import BundleError
from edgekit.export.pipeline import convert
from edgekit.staging import PARTIAL

Edgekit = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]
QUICK = ("--weights", "fp32", "--no-verify", "--target", "generic-x86")
PAGE = 4096
PRELOADED = [
    "edgekit.export.openvino_file",
    "edgekit.export.pipeline",
    "edgekit.export.to_onnx",
    "edgekit.sources.hf",
    "onnxruntime",
    "openvino_tokenizers",
    "sympy",
    "torch._dynamo",
    "transformers.tokenization_utils_tokenizers",
]


def pages(path: Path) -> int:
    return -(-path.stat().st_size // PAGE)


def fits_until(bundle: Path, name: str) -> int:
    """Pages for what is written before `name`, and about half of it."""
    written = sorted(bundle.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    before = written[: written.index(bundle / name)]
    return sum(map(pages, before)) + pages(bundle / name) // 2


@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "openvino_tokenizer.xml",
        "openvino_model.bin",
        "openvino_model.xml",
        "model.onnx.data",
        "model.onnx",
        MANIFEST,
    ],
)
def test_the_disk_fills_up(
    edgekit: Edgekit,
    checkpoint: Path,
    whole: Path,
    mount: Callable[[str], Path],
    name: str,
    force: bool,
    contents: Contents,
) -> None:
    held = sum(map(pages, whole.iterdir())) if force else 0
    disk = mount(f"size={(held + fits_until(whole, name)) * PAGE}")
    if force:
        shutil.copytree(whole, disk / "out")
    done = edgekit("convert", checkpoint, "-o", disk / "out", *QUICK, "--force")
    assert done.code == 1
    assert done.err[-1] == (
        f"edgekit: error: {disk}/out: could not be written (the disk is full); nothing changed"
    )
    assert os.listdir(disk) == (["out"] if force else [])
    if force:
        assert contents(disk / "out") == contents(whole)


@contextlib.contextmanager
def files_no_longer_than(count: int) -> Iterator[None]:
    """Writing beyond `count` bytes fails with EFBIG; Python ignores the signal that comes along."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("engine", "count"),
    [("openvino", 16_000), ("openvino", 300_000), ("onnx", 12_000), ("onnx", 300_000)],
    ids=["tokenizer-ir", "openvino", "onnx-graph", "onnx"],
)
def test_the_system_refuses_to_write_more(
    checkpoint: Path, whole: Path, out: Path, engine: str, count: int, contents: Contents
) -> None:
    shutil.copytree(whole, out)
    with files_no_longer_than(count), pytest.raises(BundleError, match=r"\(File too large.*\)"):
        convert(
            checkpoint,
            out,
            weights="fp32",
            formats=[engine],
            target="generic-x86",
            verify=False,
            force=True,
        )
    assert os.listdir(out.parent) == ["out"]
    assert contents(out) == contents(whole)


@pytest.fixture(scope="module")
def start() -> Callable[..., Process]:
    """Start the command in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def command(*arguments: object) -> Process:
        process = context.Process(target=main, args=([str(a) for a in arguments],))
        process.start()
        return process

    return command


def await_file(out: Path, name: str, process: Process) -> Path:
    """Wait until the unfinished bundle holds `name`; returns the directory it is made in."""
    for _ in range(60_000):
        for partial in out.parent.glob(f".{out.name}.*{PARTIAL}"):
            if (partial / name).exists():
                return partial
        if not process.is_alive():
            pytest.fail(f"convert ended before {name} was there")
        time.sleep(0.001)
    pytest.fail(f"{name} did not appear in a minute")


@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize(
    "name", [".", "openvino_model.bin", "model.onnx.data", "genai_config.json", MANIFEST]
)
def test_a_kill_leaves_nothing_half_written(
    checkpoint: Path,
    whole: Path,
    out: Path,
    start: Callable[..., Process],
    name: str,
    force: bool,
    contents: Contents,
) -> None:
    if force:
        shutil.copytree(whole, out)
    process = start("convert", checkpoint, "-o", out, "--force", "--weights", "fp32")
    partial = await_file(out, name, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert partial.exists()
    assert out.exists() == force
    if force:
        assert contents(out) == contents(whole)
    convert(checkpoint, out, weights="fp32", verify=False, force=force)
    assert os.listdir(out.parent) == ["out"]
    check_files(out, read_manifest(out))
