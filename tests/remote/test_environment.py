"""The wheel of this edgekit, and environments on the device made from it."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import EngineError
from edgekit.remote import profile_remotely
from edgekit.remote.device import connected
from edgekit.remote.environment import prepare_environment
from edgekit.remote.wheel import write_wheel

HOST = "127.0.0.1"
WRITE = "import pathlib, sys; from edgekit.remote.wheel import write_wheel as write; "
WRITE += "write(pathlib.Path(sys.argv[1]))"

pytestmark = pytest.mark.slow


def prepare(server: Any) -> tuple[str, list[str]]:
    """The Python of the environment there, and the names of the steps."""
    steps: list[str] = []
    with connected(HOST, sys.executable, server.ssh) as device:
        python = prepare_environment(device, ("onnx",), lambda name, *_: steps.append(name))
        where = "import edgekit, sys; print(edgekit.__file__)"
        assert device.run([python, "-P", "-c", where], "failed").startswith(str(server.cache))
    return python, steps


def test_wheels_are_the_same_whatever_they_are_made_from(tmp_path: Path) -> None:
    """From the source tree, twice, and from files that were installed from a wheel."""
    folders = [tmp_path / name for name in ("first", "second", "packed", "packed again")]
    for folder in folders:
        folder.mkdir()
    first, second = map(write_wheel, folders[:2])
    assert first.read_bytes() == second.read_bytes()
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(installed), str(first)], check=True)
    for folder in folders[2:]:
        subprocess.run(
            [sys.executable, "-P", "-c", WRITE, str(folder)],
            check=True, env={**os.environ, "PYTHONPATH": str(installed)}, cwd=tmp_path,
        )  # fmt: skip
    packed, again = (next(folder.glob("*.whl")) for folder in folders[2:])
    assert packed.name == first.name
    assert packed.read_bytes() == again.read_bytes()
    assert unpacked(packed) == unpacked(first)


def unpacked(wheel: Path) -> dict[str, bytes | set[bytes]]:
    """Its files; of the record, the lines in any order."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return {
        name: set(data.splitlines()) if name.endswith("/RECORD") else data
        for name, data in files.items()
    }


def test_an_environment_is_made_once(start_server: Callable[..., Any], tiny_bundle: Path) -> None:
    """Without edgekit's dependencies, so that nothing is downloaded."""
    server = start_server(PIP_NO_DEPS="1")
    python, steps = prepare(server)
    assert f"install edgekit on {HOST}" in steps
    assert not (server.cache / "wheels").exists()
    assert prepare(server) == (python, ["build edgekit's wheel"])
    with pytest.raises(EngineError, match=r"profile failed there: .*No module named"):
        profile_remotely(HOST, tiny_bundle, engines=("onnx",), ssh=server.ssh)


def test_a_package_that_is_not_found(start_server: Callable[..., Any]) -> None:
    server = start_server(PIP_NO_INDEX="1")
    with pytest.raises(EngineError, match="could not install edgekit there: No matching distrib"):
        prepare(server)
    with connected(HOST, sys.executable, server.ssh) as device:
        assert device.ask("environment", f"{device.cache}/environment", "any", "onnx") == "missing"
