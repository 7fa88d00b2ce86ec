"""Measurements in a process of their own, which nothing loaded before can spoil."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from edgekit import config
from edgekit.command import last_line
from edgekit.errors import EdgekitError, EngineError
from edgekit.runtime.workload import Options

__all__ = ["answer", "measured_apart"]

Found = TypeVar("Found")


def measured_apart(module: str, kind: type[Found], bundle: str | Path, options: Options) -> Found:
    """What `answer` prints in `python -m module`.

    Args:
        module: whose main calls `answer`.
        kind: the dataclass that it measures.
        bundle: the bundle's directory.
        options: what to measure.

    Raises:
        EngineError: if that process fails.
    """
    plain = json.dumps(config.dump(replace(options, memory=False)))
    command = [sys.executable, "-P", "-m", module, str(bundle), plain]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = last_line(done.stderr)
        raise EngineError(f"{bundle}: the process that runs {module} failed: {reason}")
    return config.load(kind, json.loads(done.stdout.splitlines()[-1]), where=module)


def answer(measure: Callable[[Path, Options], object], arguments: Sequence[str]) -> None:
    """The main of a module that `measured_apart` runs; an error is one line on stderr."""
    bundle, plain = arguments
    try:
        options = config.load(Options, json.loads(plain), where="options")
        found = measure(Path(bundle), options)
    except EdgekitError as error:
        sys.exit(str(error))
    print(json.dumps(config.dump(found)))
