"""The command in this process, a bundle to compare with, and file systems to fill."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekit.cli.main import main
from edgekit.export.pipeline import convert

Tiny = Callable[..., Path]


@dataclass(frozen=True, kw_only=True)
class Done:
    code: int
    err: list[str]


Edgekit = Callable[..., Done]


@pytest.fixture
def edgekit(capfd: pytest.CaptureFixture[str]) -> Edgekit:
    """Run the command here; the engines' own C++ code must not write to stderr either."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code=code, err=capfd.readouterr().err.splitlines())

    return run


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of both engines; read-only."""
    out = tmp_path_factory.mktemp("bad-input") / "whole"
    convert(checkpoint, out, weights="fp32", verify=False, target="generic-x86")
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "out"


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """`contents(directory)`: every file's bytes by name."""
    return lambda directory: {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mount("size=8k")` is an empty file system in memory, for those who may mount."""
    made: list[Path] = []

    def at(options: str) -> Path:
        directory = tmp_path / f"mount{len(made)}"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a file system")
        made.append(directory)
        return directory

    yield at
    for directory in made:
        subprocess.run(["umount", "-l", str(directory)], check=True)
