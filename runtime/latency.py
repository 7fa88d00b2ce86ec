"""How fast a bundle is, measured from outside: the time of each `Session.append`.

A prompt is timed from an empty session to its first greedy token. Decoding is timed token by token
at each depth, that is, after so many tokens were read: a recurrent model is as fast at depth 32768
as at 0. Memory is measured by a second process (`memory.py`), as measuring one disturbs the other.

Example:
    >>> from edgekit.runtime.latency import Options, measure
    >>> report = measure("out", Options(prompts=(128,), depths=(0, 4096)))       # doctest: +SKIP
    >>> report.decode[1].tokens_per_second.median                                # doctest: +SKIP
    113.2
"""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.runtime import Model, Session
from edgekit.runtime.engine import Floats, Integers
from edgekit.runtime.memory import Memory, measure_memory
from edgekit.runtime.workload import (
    Options,
    Progress,
    at_depths,
    check_context,
    greedy,
    open_model,
    prompt_ids,
)
from edgekit.targets import cpu_facts

__all__ = ["Decode", "Memory", "Options", "Prefill", "Report", "Spread", "measure"]

ENGINE_PACKAGES = {"openvino": "openvino", "onnx": "onnxruntime"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The median of the repetitions with the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """Reading a prompt of `tokens` tokens; `ttft_ms` runs until the first greedy token is known."""

    tokens: int
    tokens_per_second: Spread
    ttft_ms: Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """Decoding one token at a time after `depth` tokens; percentiles are over every timed token."""

    depth: int
    tokens: int
    tokens_per_second: Spread
    p50_ms: float
    p90_ms: float
    p99_ms: float
    state_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything measured, with what is needed to measure it again.

    Attributes:
        mixers: how many layers have each token mixer.
        output_md5: of the greedy token ids at the last depth, comma separated.
        load_average: of the machine over one minute, before and after: other programs spoil it;
            None where the system does not tell (Windows).
        adapters: weights by name of the run-time adapters that were set.
    """

    bundle: str
    engine: str
    device: str
    weights: str
    mixers: dict[str, int]
    threads: int | None
    repeat: int
    model_bytes: int
    load_ms: float
    compile_ms: float
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    memory: Memory | None
    output_md5: str
    load_average: tuple[float, float] | None
    cpu: str
    cpu_count: int
    versions: dict[str, str]
    adapters: dict[str, float]


def measure(bundle: str | Path, options: Options, progress: Progress | None = None) -> Report:
    """Load a bundle and measure it.

    Args:
        bundle: its directory.
        options: what to measure.
        progress: called with a step's name, its number and the count of steps.

    Raises:
        BundleError: if it is not a sound bundle.
        EngineError: if the engine or device is missing.
        UsageError: if a softmax layer's context is shorter than a prompt or depth asked for.
    """
    before = _load_average()
    tell = _teller(options, progress)
    model = open_model(bundle, options)
    check_context(model, options)
    ids = prompt_ids(model, options.longest)
    prefill = []
    for length in options.prompts:
        tell(f"read {length} tokens")
        prefill.append(_prefill(model, ids[:length], options.repeat))
    decode, output = _sweep(model, ids, options, tell)
    facts = _facts(model, bundle, options)
    tell("memory, in a second process")
    del model  # the second process must not share the machine's memory with a loaded model
    memory = measure_memory(bundle, options) if options.memory else None
    after = _load_average()
    return Report(
        **facts,
        prefill=tuple(prefill),
        decode=decode,
        memory=memory,
        output_md5=hashlib.md5(",".join(map(str, output)).encode()).hexdigest(),
        load_average=(before, after) if before is not None and after is not None else None,
    )


def _load_average() -> float | None:
    """Of one minute; None on a system without it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _teller(options: Options, progress: Progress | None) -> Callable[[str], None]:
    """A function that announces the next step."""
    count = 1 + len(options.prompts) + len(set(options.depths))
    numbers = iter(range(count))
    return lambda name: None if progress is None else progress(name, next(numbers), count)


def _prefill(model: Model, ids: Integers, repeat: int) -> Prefill:
    seconds, first = [], []
    for _ in range(repeat + 1):
        session = model.session()
        start = time.perf_counter()
        logits = session.append(ids)
        seconds.append(time.perf_counter() - start)
        int(logits[0].argmax())
        first.append(time.perf_counter() - start)
    return Prefill(
        tokens=len(ids),
        tokens_per_second=_spread([len(ids) / s for s in seconds[1:]]),
        ttft_ms=_spread([1e3 * s for s in first[1:]]),
    )


def _sweep(
    model: Model, ids: Integers, options: Options, tell: Callable[[str], None]
) -> tuple[tuple[Decode, ...], list[int]]:
    """Decode at each depth, reading on from the depth before; also the last greedy output."""
    rows, output = [], list[int]()
    for depth, session, logits in at_depths(model, ids, options.depths, tell):
        row, output = _decode(session, logits, depth, options)
        rows.append(row)
    return tuple(rows), output


def _decode(
    session: Session, logits: Floats, depth: int, options: Options
) -> tuple[Decode, list[int]]:
    here = session.snapshot()
    rates, steps, output, state_bytes = [], list[float](), list[int](), 0
    for repetition in range(options.repeat + 1):
        session.restore(here)
        times, output = greedy(session, logits, options.tokens)
        state_bytes = session.state_bytes
        if repetition > 0:
            rates.append(len(times) / sum(times))
            steps += times
    p50, p90, p99 = (float(1e3 * q) for q in np.percentile(steps, [50, 90, 99]))
    row = Decode(
        depth=depth,
        tokens=options.tokens,
        tokens_per_second=_spread(rates),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        state_bytes=state_bytes,
    )
    return row, output


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=float(np.median(values)), low=min(values), high=max(values))


def _facts(model: Model, bundle: str | Path, options: Options) -> dict[str, Any]:
    mixers = model.manifest.mixers
    engine = ENGINE_PACKAGES[model.engine]
    packages = {"edgekit": "edgekit-lm", "numpy": "numpy", engine: engine}
    return {
        "bundle": Path(bundle).resolve().name,
        "engine": model.engine,
        "device": model.device,
        "weights": model.manifest.weights,
        "adapters": model.active_adapters,
        "mixers": {name: mixers.count(name) for name in sorted(set(mixers))},
        "threads": options.threads,
        "repeat": options.repeat,
        "model_bytes": model.model_bytes,
        "load_ms": 1e3 * model.load_seconds,
        "compile_ms": 1e3 * model.compile_seconds,
        "cpu": cpu_facts().get("model name") or platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count() or 0,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(package) for name, package in packages.items()},
    }
