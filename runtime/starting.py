"""How long a bundle takes to load: without compiled blobs at hand, and with those it left."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgekit.runtime.apart import answer, measured_apart
from edgekit.runtime.workload import Options, open_model

__all__ = ["Starting", "measure_starting"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Starting:
    """Milliseconds of two loads one after the other, with one cache directory.

    Files are read from the system's page cache both times: it is the compilation that differs.

    Attributes:
        cold_load: with an empty cache directory, compilation included.
        cold_compile: the engine's part of it, writing the cache included.
        cached_load: with what the first one left there.
        cached_compile: the engine's part of it.
    """

    cold_load: float
    cold_compile: float
    cached_load: float
    cached_compile: float


def measure_starting(bundle: str | Path, options: Options) -> Starting | None:
    """Load twice in a process of its own.

    Returns:
        None for an engine that keeps no compiled blobs (ONNX Runtime).

    Raises:
        EngineError: if that process fails.
    """
    if options.engine == "onnx":
        return None
    return measured_apart("edgekit.runtime.starting", Starting, bundle, options)


def _starting_here(bundle: Path, options: Options) -> Starting:
    times = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            model = open_model(bundle, options, cache_dir=cache)
            times.append((1e3 * model.load_seconds, 1e3 * model.compile_seconds))
            del model  # a second copy of the weights would slow the second load
    (cold_load, cold_compile), (cached_load, cached_compile) = times
    return Starting(
        cold_load=cold_load,
        cold_compile=cold_compile,
        cached_load=cached_load,
        cached_compile=cached_compile,
    )


if __name__ == "__main__":
    answer(_starting_here, sys.argv[1:])
