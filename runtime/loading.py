"""A bundle's directory becomes a model on one engine."""

import importlib
import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from edgekit import targets
from edgekit.bundle import Manifest, check_files, read_manifest
from edgekit.errors import EngineError, UsageError
from edgekit.runtime.engine import Engine, EngineSettings
from edgekit.runtime.images import PROCESSOR
from edgekit.runtime.model import Model
from edgekit.runtime.text import Tokenizer
from edgekit.runtime.vision import Vision, open_eye

__all__ = ["ENGINES", "load"]

# Per engine: the package it needs, our module, and the class in it.
ENGINES = {
    "openvino": ("openvino", "edgekit.runtime.ov", "OpenVinoEngine"),
    "onnx": ("onnxruntime", "edgekit.runtime.ort", "OnnxEngine"),
}
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def load(
    path: Path | str,
    *,
    engine: str | None = None,
    device: str | None = None,
    logits: Literal["last", "all"] = "last",
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    graph: str | None = None,
    check: bool = True,
    profiling: bool = False,
) -> "Model":
    """Open a bundle on one engine.

    Args:
        path: the bundle's directory.
        engine: `openvino` or `onnx`; None: the target's if the bundle has it and it is installed,
            else the bundle's first that is.
        device: the engine's device name, such as `CPU` or, with OpenVINO, `GPU`; None: the target's
            on the target's engine, `CPU` on the other one.
        logits: `all` makes `Session.append` answer for every position, as perplexity needs.
        threads: CPU threads; None: the target's setting, or else the engine's choice.
        cache_dir: where OpenVINO keeps compiled blobs, which makes the next load faster; None: the
            target's setting.
        graph: OpenVINO's form of the decoder, `dynamic`, `stepped` or `static`
            (`targets.Target.graph`); None: the target's, on its own device.
        check: compare the sha256 of every file that is used with the manifest.
        profiling: take the time of every operator, for `Model.operator_times`.

    Raises:
        BundleError: if the bundle is missing, damaged, or of another format version.
        EngineError: if the engine is not installed or not in the bundle, or the device is not here.
        UsageError: for an argument that is not allowed, or a bundle that its target cannot serve.

    Example:
        >>> model = load("smollm2")                                  # doctest: +SKIP
        >>> model.generate("The capital of France is", max_new_tokens=3)    # doctest: +SKIP
        ' Paris.'
    """
    if logits not in ("last", "all"):
        raise UsageError(f"logits {logits!r} given; allowed: last, all")
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads} given; allowed: 1 or more")
    started = time.perf_counter()
    directory = Path(path)
    manifest = read_manifest(directory)
    target = targets.load(manifest.target)
    name = _chosen_engine(manifest, engine, target.engine)
    if check:
        wanted = (*manifest.engine_files(name), *TEXT_FILES, PROCESSOR)
        check_files(directory, manifest, (file for file in wanted if file in manifest.files))
    settings = _settings(target, name, device, logits, threads, cache_dir, profiling)
    graph = _graph(target, manifest, settings, name, graph)
    settings = replace(settings, graph=graph)
    if settings.device == target.device:
        targets.check_serves(target, manifest, targets.memory_bytes())
    tokenizer = Tokenizer(directory)
    _, module, kind = ENGINES[name]
    compiled: Engine = getattr(importlib.import_module(module), kind)(directory, manifest, settings)
    facts = manifest.vision
    vision = None
    if facts is not None:
        vision = Vision(open_eye(directory, facts), facts, compiled.look)
    return Model(
        manifest,
        name,
        compiled,
        settings,
        tokenizer=tokenizer,
        vision=vision,
        block=target.prefill_block[name],
        load_seconds=time.perf_counter() - started,
    )


def _settings(
    target: targets.Target,
    engine: str,
    device: str | None,
    logits: Literal["last", "all"],
    threads: int | None,
    cache_dir: str | Path | None,
    profiling: bool,
) -> EngineSettings:
    """The target's settings, and what was asked for instead."""
    # A device name means something to its own engine only, and precision to its own device.
    preferred = target.device if engine == target.engine else "CPU"
    device = preferred if device is None else device
    own = device == target.device
    return EngineSettings(
        device=device,
        logits=logits,
        threads=target.threads if threads is None else threads,
        cache_dir=target.cache_path if cache_dir is None else Path(cache_dir),
        precision=target.inference_precision if own else "f32",
        profiling=profiling,
        hints=target.hints if own else {"PERFORMANCE_HINT": "LATENCY"},
    )


def _graph(
    target: targets.Target,
    manifest: Manifest,
    settings: EngineSettings,
    engine: str,
    asked: str | None,
) -> str:
    """What was asked for, or what the target's own device can have."""
    if asked is not None:
        if engine != "openvino" or asked not in targets.GRAPHS:
            raise UsageError(
                f"graph {asked!r} given on {engine}; allowed: {', '.join(targets.GRAPHS)}, on "
                "openvino alone"
            )
        return asked
    if engine != "openvino" or settings.device != target.device:
        return "dynamic"
    graph = targets.fitting_graph(target, manifest, targets.memory_bytes())
    # Who wants the logits of every position reads texts, and decodes little.
    return "dynamic" if graph == "stepped" and settings.logits == "all" else graph


def _chosen_engine(manifest: Manifest, engine: str | None, preferred: str) -> str:
    if engine is not None:
        if engine not in ENGINES:
            raise UsageError(f"engine {engine!r} is unknown; known: {', '.join(ENGINES)}")
        if engine not in manifest.engines:
            raise EngineError(
                f"engine {engine!r} given; this bundle was made for {', '.join(manifest.engines)}: "
                f"convert again with --format {engine}"
            )
        if not _installed(engine):
            raise EngineError(f"{ENGINES[engine][0]} is not installed; {_advice(engine)}")
        return engine
    found = [name for name in manifest.engines if name in ENGINES and _installed(name)]
    if not found:
        wanted = " or ".join(ENGINES[name][0] for name in manifest.engines if name in ENGINES)
        raise EngineError(f"this bundle needs {wanted}; {_advice(manifest.engines[0])}")
    return preferred if preferred in found else found[0]


def _installed(engine: str) -> bool:
    return importlib.util.find_spec(ENGINES[engine][0]) is not None


def _advice(engine: str) -> str:
    return f'install it with: pip install "edgekit-lm[{engine}]"'
