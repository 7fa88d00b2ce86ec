"""The least time that a decoding step can take here: what it must read, over how fast memory reads.

A step reads every weight once, and the state; no cache holds that much from one step to the next,
so it comes from memory. Counted are the weights that `traffic.py` finds and the state once. Not
counted are writing the state back, activations, logits, arithmetic, and the row of the token table:
a real step takes longer. It may be faster only where a model is so small that the last-level cache
keeps part of it.

The rate is that of numpy reading a buffer eight times as large as the largest cache, in as many
threads as asked for. The floor takes the highest repetition, as other programs only ever slow one.

Example:
    >>> from edgekit.peers.floor import floors, measure_bandwidth
    >>> floors("out", "openvino", (0, 4096), measure_bandwidth(2))               # doctest: +SKIP
"""

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.bundle import read_manifest
from edgekit.errors import EngineError, UsageError
from edgekit.peers.cpus import usable_threads
from edgekit.peers.traffic import weight_bytes
from edgekit.runtime.latency import Spread
from edgekit.runtime.state import state_bytes

__all__ = ["Bandwidth", "Floor", "floors", "measure_bandwidth"]

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST = 256 * 2**20
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidth:
    """How fast memory is read.

    Attributes:
        threads: that read side by side.
        buffer_bytes: read in each repetition.
        cache_bytes: of the largest cache; None where the system does not tell.
    """

    threads: int
    buffer_bytes: int
    cache_bytes: int | None
    bytes_per_second: Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """What a step after `depth` tokens reads, and the least time that takes."""

    depth: int
    weight_bytes: int
    state_bytes: int
    ms_per_token: float
    tokens_per_second: float


def measure_bandwidth(threads: int | None = None, repeat: int = 9) -> Bandwidth:
    """Read a large buffer again and again; takes about a second and 256 MiB or more.

    Args:
        threads: that read side by side; None: one for each CPU that this process may run on.
        repeat: repetitions, after one that is not counted.

    Raises:
        UsageError: if either is below 1.
    """
    for name, value in (("threads", threads), ("repeat", repeat)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value} given; allowed: 1 or more")
    count, cache = usable_threads(threads), largest_cache()
    buffer = np.ones(max(LEAST, 8 * (cache or 0)) // 8, dtype=np.int64)
    parts = np.array_split(buffer, count)
    with ThreadPoolExecutor(count) as pool:
        seconds = [_read(pool, parts) for _ in range(repeat + 1)][1:]
    return Bandwidth(
        threads=count,
        buffer_bytes=buffer.nbytes,
        cache_bytes=cache,
        bytes_per_second=Spread.of([buffer.nbytes / s for s in seconds]),
    )


def floors(
    bundle: str | Path, engine: str, depths: Sequence[int], bandwidth: Bandwidth
) -> tuple[Floor, ...]:
    """The floor of a bundle's decoding at each depth.

    Args:
        bundle: its directory.
        engine: `openvino` or `onnx`, as measured.
        depths: tokens read before.
        bandwidth: of this machine.

    Raises:
        BundleError: if it is not a sound bundle.
        EngineError: if the bundle is not for that engine, or a package that reads it is missing.
    """
    manifest = read_manifest(bundle)
    if engine not in manifest.engines:
        raise EngineError(
            f"engine {engine!r} given; this bundle is for {', '.join(manifest.engines)}"
        )
    weights = weight_bytes(Path(bundle) / manifest.engine_files(engine)[0])
    found = []
    for depth in sorted(set(depths)):
        state = state_bytes(manifest, engine, depth)
        seconds = (weights + state) / bandwidth.bytes_per_second.high
        found.append(
            Floor(
                depth=depth,
                weight_bytes=weights,
                state_bytes=state,
                ms_per_token=1e3 * seconds,
                tokens_per_second=1 / seconds,
            )
        )
    return tuple(found)


def largest_cache(root: Path = CACHES) -> int | None:
    """Bytes of the largest cache of the first CPU, which Linux tells under `root`; else None."""
    texts = [file.read_text(encoding="ascii").strip() for file in root.glob("index*/size")]
    parts = [re.fullmatch(r"(\d+)([KMG]?)", text) for text in texts]
    return max((int(part[1]) * UNITS[part[2]] for part in parts if part), default=None)


def _read(
    pool: ThreadPoolExecutor, parts: Sequence["np.ndarray[tuple[int], np.dtype[np.int64]]"]
) -> float:
    """Seconds to read every part; numpy lets go of the interpreter's lock meanwhile."""
    start = time.perf_counter()
    list(pool.map(np.bitwise_or.reduce, parts))
    return time.perf_counter() - start
