"""A virtual environment on the device with this very edgekit and the engines asked for.

There is one for all runs, brought up to date when edgekit or the device's Python changed. Packages
come from the index that the device's own pip uses.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgekit.bundle import describe_files
from edgekit.errors import EngineError
from edgekit.remote.device import Device
from edgekit.remote.transfer import Progress, content_key, copy_directory
from edgekit.remote.wheel import write_wheel

__all__ = ["prepare_environment"]

PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
FAILURE = "pip could not install edgekit there"


def prepare_environment(device: Device, engines: Sequence[str], progress: Progress) -> str:
    """Make the environment be there.

    Args:
        device: where.
        engines: extras of edgekit to install, `openvino` or `onnx`.
        progress: called with a step's name, its number and the count of steps.

    Returns:
        The path of its Python.

    Raises:
        EngineError: if the device's Python cannot make one, or pip fails, with its last line.
    """
    folder = f"{device.cache}/environment"
    python = f"{folder}/bin/python"
    progress("build edgekit's wheel", 0, 1)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
        wheel = write_wheel(Path(work))
        files = describe_files(wheel.parent)
        key = content_key(files)
        state = device.ask("environment", folder, key, *engines)
        if state == "ready":
            return python
        wheels = f"{device.cache}/wheels"
        copied = copy_directory(device, wheel.parent, files, f"{wheels}/{key}/wheel", progress)
    progress(f"install edgekit on {device.host}", 0, 1)
    if state == "missing":
        _make(device, folder)
    device.ask("unready", folder)
    _install(device, python, f"{copied.path}/{wheel.name}", engines)
    device.ask("ready", folder, wheels, key, *engines)
    return python


def _make(device: Device, folder: str) -> None:
    if not device.has_venv:
        raise EngineError(
            f"{device.host}: its Python cannot make virtual environments; install the package for "
            "that (Debian: apt install python3-venv), or name a Python that has edgekit"
        )
    command = [device.python, "-m", "venv", "--clear", folder]
    device.run(command, "no virtual environment could be made there")


def _install(device: Device, python: str, wheel: str, engines: Sequence[str]) -> None:
    """Twice, as pip keeps an edgekit of the same version, however old its files are."""
    device.run([python, *PIP, "--force-reinstall", "--no-deps", wheel], FAILURE)
    device.run([python, *PIP, f"{wheel}[{','.join(engines)}]"], FAILURE)
