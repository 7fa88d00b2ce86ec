"""How fast a bundle is, measured from outside: the time of each `Session.append`.

A prompt is timed from an empty session to its first greedy token. Decoding is timed token by token
at each depth, that is, after so many tokens were read: a recurrent model is as fast at depth 32768
as at 0. Memory, loading and operators are measured by processes and models of their own, as
measuring one disturbs the other.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np

from edgekit.runtime import Model, Session
from edgekit.runtime.energy import energy_meter
from edgekit.runtime.engine import Floats, Integers
from edgekit.runtime.memory import Memory, measure_memory
from edgekit.runtime.operators import Operators, measure_operators
from edgekit.runtime.starting import Starting, measure_starting
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

__all__ = ["Decode", "Memory", "Options", "Prefill", "Report", "Spread", "Steps", "measure"]

ENGINE_PACKAGES = {"openvino": "openvino", "onnx": "onnxruntime"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The median of the repetitions, the lowest and the highest, and each of them in order."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Of one sample or more."""
        given = tuple(map(float, samples))
        return cls(median=float(np.median(given)), low=min(given), high=max(given), samples=given)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """Reading a prompt of `tokens` tokens; `ttft_ms` runs until the first greedy token is known.

    `joules_per_token` is of the whole processor; None where the system does not tell.
    """

    tokens: int
    tokens_per_second: Spread
    ttft_ms: Spread
    joules_per_token: float | None = None

    @classmethod
    def of(cls, tokens: int, times: Sequence[tuple[float, float]], **more: Any) -> "Prefill":
        """Of some readings: seconds until the prompt was read, and until the token was known."""
        read, first = zip(*times, strict=True)
        return cls(
            tokens=tokens,
            tokens_per_second=Spread.of([tokens / seconds for seconds in read]),
            ttft_ms=Spread.of([1e3 * seconds for seconds in first]),
            **more,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """Decoding one token at a time after `depth` tokens; percentiles are over every timed token."""

    depth: int
    tokens: int
    tokens_per_second: Spread
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @classmethod
    def of(cls, depth: int, times: Sequence[Sequence[float]], **more: Any) -> Self:
        """Of some repetitions, the seconds of each step in each."""
        p50, p90, p99 = (float(1e3 * q) for q in np.percentile(times, [50, 90, 99]))
        return cls(
            depth=depth,
            tokens=len(times[0]),
            tokens_per_second=Spread.of([len(steps) / sum(steps) for steps in times]),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            **more,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode(Steps):
    """What a session tells besides: the bytes of its state, and energy as in `Prefill`."""

    state_bytes: int
    joules_per_token: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything measured, with what is needed to measure it again.

    Attributes:
        graph: OpenVINO's form of the decoder, as `targets.Target.graph` says it.
        complete: whether everything that was asked for is there; a report is kept at every step.
        mixers: how many layers have each token mixer.
        starting: loads with and without compiled blobs, if asked for and the engine keeps them.
        operators: what the engine's operators took, if asked for.
        output_md5: of the greedy token ids at the last depth, comma separated.
        load_average: of the machine over one minute, before and after: other programs spoil it;
            None where the system does not tell (Windows).
        adapters: weights by name of the run-time adapters that were set.
    """

    bundle: str
    complete: bool
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
    starting: Starting | None
    operators: tuple[Operators, ...]
    output_md5: str
    load_average: tuple[float, float] | None
    cpu: str
    cpu_count: int
    versions: dict[str, str]
    adapters: dict[str, float]
    graph: str = "dynamic"


def measure(
    bundle: str | Path,
    options: Options,
    progress: Progress | None = None,
    keep: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Load a bundle and measure it.

    Args:
        bundle: its directory.
        options: what to measure.
        progress: called with a step's name, its number and the count of steps.
        keep: called with what is known after each step.

    Raises:
        BundleError: if it is not a sound bundle.
        EngineError: if the engine or device is missing.
        UsageError: if a softmax layer's context is shorter than a prompt or depth asked for.
    """
    before = _load_average()
    tell = _teller(options, progress)
    model = open_model(bundle, options)
    check_context(model, options)
    report = _nothing(model, bundle, options, before)
    for found in _timed(model, options, tell):
        report = _kept(keep, report, found)
    del model  # what follows must not share the machine's memory with a loaded model
    for found in _apart(bundle, replace(options, engine=report.engine), tell):
        report = _kept(keep, report, found)
    after = _load_average()
    load = (before, after) if before is not None and after is not None else None
    return _kept(keep, report, {"load_average": load, "complete": True})


def _timed(model: Model, options: Options, tell: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Prompts, then decoding from depth to depth, reading on in between."""
    ids = prompt_ids(model, options.longest)
    prefill: tuple[Prefill, ...] = ()
    for length in options.prompts:
        tell(f"read {length} tokens")
        prefill += (_prefill(model, ids[:length], options.repeat),)
        yield {"prefill": prefill}
    decode: tuple[Decode, ...] = ()
    for depth, session, logits in at_depths(model, ids, options.depths, tell):
        row, output = _decode(session, logits, depth, options)
        decode += (row,)
        digest = hashlib.md5(",".join(map(str, output)).encode()).hexdigest()
        yield {"decode": decode, "output_md5": digest}


def _apart(
    bundle: str | Path, options: Options, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """What has a process or a model of its own."""
    if options.memory:
        tell("memory, in a second process")
        yield {"memory": measure_memory(bundle, options)}
    if options.starting:
        tell("loading, in a second process")
        yield {"starting": measure_starting(bundle, options)}
    if options.operators:
        tell("operators")
        yield {"operators": measure_operators(bundle, options)}


def _kept(keep: Callable[[Report], object], report: Report, found: dict[str, Any]) -> Report:
    """The report with what was found."""
    further = replace(report, **found)
    keep(further)
    return further


def _load_average() -> float | None:
    """Of one minute; None on a system without it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _teller(options: Options, progress: Progress | None) -> Callable[[str], None]:
    """A function that announces the next step."""
    others = (options.memory, options.starting, options.operators)
    count = len(options.prompts) + len(set(options.depths)) + sum(others)
    numbers = iter(range(count))
    return lambda name: None if progress is None else progress(name, next(numbers), count)


def _prefill(model: Model, ids: Integers, repeat: int) -> Prefill:
    _first_token(model, ids)  # not counted
    joules = energy_meter()
    times = [_first_token(model, ids) for _ in range(repeat)]
    joules_per_token = _share(joules(), repeat * len(ids))
    return Prefill.of(len(ids), times, joules_per_token=joules_per_token)


def _first_token(model: Model, ids: Integers) -> tuple[float, float]:
    """Seconds until an empty session has read a prompt, and until its first token is known."""
    session = model.session()
    start = time.perf_counter()
    logits = session.append(ids)
    read = time.perf_counter() - start
    int(logits[0].argmax())
    return read, time.perf_counter() - start


def _decode(
    session: Session, logits: Floats, depth: int, options: Options
) -> tuple[Decode, list[int]]:
    here = session.snapshot()
    _, output = greedy(session, logits, options.tokens)  # not counted
    times = []
    joules = energy_meter()
    for _ in range(options.repeat):
        session.restore(here)
        steps, output = greedy(session, logits, options.tokens)
        times.append(steps)
    row = Decode.of(
        depth,
        times,
        state_bytes=session.state_bytes,
        joules_per_token=_share(joules(), options.repeat * options.tokens),
    )
    return row, output


def _share(joules: float | None, tokens: int) -> float | None:
    return None if joules is None else joules / tokens


def _nothing(model: Model, bundle: str | Path, options: Options, load: float | None) -> Report:
    """A report of what is known before anything is measured."""
    mixers = model.manifest.mixers
    engine = ENGINE_PACKAGES[model.engine]
    packages = {"edgekit": "edgekit-lm", "numpy": "numpy", engine: engine}
    return Report(
        bundle=Path(bundle).resolve().name,
        complete=False,
        engine=model.engine,
        device=model.device,
        graph=model.graph,
        weights=model.manifest.weights,
        adapters=model.active_adapters,
        mixers={name: mixers.count(name) for name in sorted(set(mixers))},
        threads=options.threads,
        repeat=options.repeat,
        model_bytes=model.model_bytes,
        load_ms=1e3 * model.load_seconds,
        compile_ms=1e3 * model.compile_seconds,
        prefill=(),
        decode=(),
        memory=None,
        starting=None,
        operators=(),
        output_md5="",
        load_average=None if load is None else (load, load),
        cpu=cpu_facts().get("model name") or platform.processor() or platform.machine(),
        cpu_count=os.cpu_count() or 0,
        versions={"python": platform.python_version()}
        | {name: metadata.version(package) for name, package in packages.items()},
    )
