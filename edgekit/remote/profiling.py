"""`edgekit profile` on another machine: what is needed is copied there, and the report comes back.

The device needs an SSH server and Python 3.11 or newer. What was copied and installed stays in its
cache directory (`EDGEKIT_CACHE`, else `~/.cache/edgekit`) for the next time.
"""

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from edgekit.bundle import read_manifest
from edgekit.errors import EngineError
from edgekit.remote.device import Device, connected
from edgekit.remote.environment import prepare_environment
from edgekit.remote.transfer import Progress, copy_bundle

__all__ = ["profile_remotely"]

STEP = re.compile(r"\[(\d+)/(\d+)\] (.*?)( \(\d+ s\))?")  # a line of edgekit.cli.progress


def profile_remotely(
    host: str,
    bundle: str | Path,
    arguments: Sequence[str] = (),
    *,
    engines: Sequence[str] = (),
    python: str | None = None,
    ssh: Sequence[str] = (),
    progress: Progress = lambda name, number, count: None,
) -> str:
    """Measure a bundle on another machine; interrupted here, it stops there too.

    Args:
        host: as `ssh` takes it, such as `user@device`; it must let us in without a password.
        bundle: its directory here.
        arguments: of `edgekit profile` after the bundle, without `--format`, `--output` and paths
            of this machine.
        engines: to install there, `openvino` or `onnx`; none: those that the bundle is for.
        python: a Python there that has edgekit and the engines, its path or a name on its PATH;
            None: an environment made from its `python3`.
        ssh: further words for `ssh`, such as `("-p", "2222")`.
        progress: called with a step's name, its number and the count of steps, also from a thread
            of its own.

    Returns:
        The JSON that `edgekit profile --format json` prints there.

    Raises:
        BundleError: if the bundle is not sound.
        UsageError: if `host` is no host.
        EngineError: if it cannot be reached, refuses us, lacks Python or space, or fails.
    """
    manifest = read_manifest(bundle)
    progress(f"connect to {host}", 0, 1)
    with connected(host, python or "python3", ssh) as device, device.exclusive():
        runner = python or prepare_environment(device, engines or manifest.engines, progress)
        copied = copy_bundle(device, Path(bundle), progress)
        command = [runner, "-P", "-m", "edgekit", "profile", copied.path, *arguments]
        progress(f"measure on {host}", 0, 1)
        return _report(device, [*command, "--format", "json"], progress)


def _report(device: Device, command: Sequence[str], progress: Progress) -> str:
    said: list[str] = []

    def told(line: str) -> None:
        if step := STEP.fullmatch(line):
            progress(step[3], int(step[1]) - 1, int(step[2]))
        else:
            said.append(line)

    report = device.run(command, "edgekit profile failed there", told)
    for line in said:
        warnings.warn(f"{device.host}: {line.removeprefix('edgekit: ')}", stacklevel=3)
    try:
        json.loads(report)
    except ValueError as cause:
        raise EngineError(f"{device.host}: edgekit profile printed no report there") from cause
    return report
