"""`convert`: a model source in, a verified bundle out, whole or not at all."""

import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekit import __version__, targets
from edgekit.bundle import (
    FORMAT_VERSION,
    Manifest,
    ModelFacts,
    VisionFacts,
    describe_files,
    write_manifest,
)
from edgekit.config import dump
from edgekit.export import text_files
from edgekit.export.fidelity import Fidelity, measure_fidelity
from edgekit.export.plan import Plan, check_choices, make_plan
from edgekit.export.side_paths import slot_shapes
from edgekit.export.states import input_names, state_records
from edgekit.export.verify import Verification, bounds_for, verification_tokens, verify_engine
from edgekit.models.spin import SpinConfig
from edgekit.sources import open_source
from edgekit.sources.adapted import LiNeS
from edgekit.sources.adapters import AdapterChoice, parse_choice
from edgekit.staging import staged
from edgekit.targets.schema import ENGINES

if TYPE_CHECKING:
    from edgekit.export.vision_files import Side

__all__ = ["ConvertReport", "convert"]

Progress = Callable[[str, int, int], None]
PACKAGES = (
    "torch",
    "openvino",
    "openvino-tokenizers",
    "nncf",
    "onnx",
    "onnxruntime",
    "transformers",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertReport:
    """What `convert` did.

    Attributes:
        out: the bundle.
        seconds: wall time, verification included.
        peak_rss_bytes: highest resident memory of this process so far.
        write_peak_rss_bytes: the same before verification began.
        model_bytes: size of each engine's graph and weights.
        verification: how far each engine is from PyTorch; empty if it was not asked for.
        fidelity: what each engine's rounding leaves of the adapters; empty without any.
        notes: what the user should know.
    """

    out: Path
    seconds: float
    peak_rss_bytes: int
    write_peak_rss_bytes: int
    model_bytes: dict[str, int]
    verification: dict[str, Verification]
    fidelity: tuple[Fidelity, ...]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    student: str | Path | None = None,
    mixer: str | None = None,
    state_sharing: str | None = None,
    softmax_layers: Sequence[int] = (),
    weights: str | None = None,
    formats: Sequence[str] = ENGINES,
    target: str = "auto",
    onnx_ops: str | None = None,
    calibration: str | Path | None = None,
    adapters: Sequence[str | Path | AdapterChoice] = (),
    adapter_mode: str | None = None,
    lines: tuple[float, float] | None = None,
    untie: bool = False,
    adapter_slots: str | Sequence[str] = (),
    spin: SpinConfig | None = None,
    spin_scores: bool = False,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert a model into a bundle for the device.

    Args:
        source: a Hugging Face directory or Hub id, a `.gguf` file, or `smollm2-135m-instruct`.
        out: the bundle directory to make.
        student: a directory that `edgekit distill` wrote, or the name of a student that ships with
            edgekit; it says the mixers itself.
        mixer: token mixer of every layer but `softmax_layers`, untrained; None: softmax.
        state_sharing: for `lawcat`, `q_head` (default) or `kv_head`.
        softmax_layers: layers that keep softmax attention.
        weights: `fp32`, `fp16`, `int8` or `int4`; None takes the target's.
        formats: engines to write for, `openvino` and `onnx`.
        target: device profile, or `auto`.
        onnx_ops: `contrib` (default) for ONNX Runtime's fused operators, or `portable`.
        calibration: text file for data-aware int4 of the OpenVINO graph.
        adapters: PEFT adapters of `source`, each `PATH` or `PATH:WEIGHT`, merged in fp32 before
            anything is rounded.
        adapter_mode: `merge` (default), or `side-path` to keep low-rank adapters exact beside
            rounded weights.
        lines: factors of the adapters' differences in the first and the last layer (LiNeS).
        untie: where an adapter changes a head that is the embedding too, give it its own.
        adapter_slots: linear layers that take adapters at run time: `all`, or names such as
            `q_proj`, patterns of module paths, and directories of adapters.
        spin: heads of a vision-language model to turn down by how far they look at the picture.
        spin_scores: let the bundle say with every token how far these heads look at the picture;
            without `spin`, all heads, and none is turned down.
        verify: compare both engines with PyTorch, and fail above `verify.bounds_for`.
        force: replace an existing bundle at `out`.
        progress: called with the step's name, its number and the count of steps.

    Returns:
        What was written, how long it took, and how close it is.

    Raises:
        UsageError: for an argument that is not allowed, or that nothing would read.
        EngineError: if an engine needed for verification is not installed.
        SourceError: if the source or student cannot be read, is not supported, or the student is
            of another base.
        AdapterError: if an adapter cannot be read, is of an unknown kind, or does not fit.
        BundleError: if `out` exists or cannot be written.
        VerificationError: if the bundle differs too much; nothing is left at `out`.

    Example:
        >>> from edgekit import convert
        >>> convert("smollm2-135m-instruct", "out", weights="int4")  # doctest: +SKIP
    """
    started = time.perf_counter()
    choices = [a if isinstance(a, AdapterChoice) else parse_choice(str(a)) for a in adapters]
    factors = None if lines is None else LiNeS(first=lines[0], last=lines[1])
    check_choices(
        student=student,
        mixer=mixer,
        state_sharing=state_sharing,
        softmax_layers=softmax_layers,
        weights=weights,
        formats=formats,
        onnx_ops=onnx_ops,
        adapters=choices,
        adapter_mode=adapter_mode,
        lines=factors,
        untie=untie,
        verify=verify,
    )
    with staged(out, force=force) as work:
        plan = make_plan(
            open_source(source),
            student=student,
            mixer=mixer,
            state_sharing=state_sharing,
            softmax_layers=softmax_layers,
            weights=weights,
            formats=formats,
            target=target,
            onnx_ops=onnx_ops,
            calibration=calibration,
            adapters=choices,
            adapter_mode=adapter_mode,
            lines=factors,
            untie=untie,
            adapter_slots=adapter_slots,
            spin=spin,
            spin_scores=spin_scores,
        )
        tell = _teller(plan.progress_steps(verify), progress)
        side = _vision(plan)
        fidelity = _fidelity(plan, tell)
        manifest = _write(plan, side, work, fidelity, tell)
        write_peak = _peak_rss()
        results = _verify(plan, side, work, tell) if verify else {}
        tell("checksums")
        write_manifest(work, replace(manifest, verification=dump(results)))
        sizes = {e: _model_bytes(work, manifest, e) for e in plan.formats}
    return ConvertReport(
        out=Path(out),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=_peak_rss(),
        write_peak_rss_bytes=write_peak,
        model_bytes=sizes,
        verification=results,
        fidelity=fidelity,
        notes=(*plan.notes, *_warnings(fidelity)),
    )


def _teller(steps: list[str], progress: Progress | None) -> Callable[[str], None]:
    def tell(step: str) -> None:
        if progress is not None:
            progress(step, steps.index(step), len(steps))

    return tell


def _fidelity(plan: Plan, tell: Callable[[str], None]) -> tuple[Fidelity, ...]:
    """What is left of merged adapters; beside the weights they are exact."""
    if plan.plain is None or plan.adapter_mode != "merge":
        return ()
    tell("measure adapters")
    return tuple(
        measure_fidelity(
            plan.plain,
            plan.weights,
            plan.adapted_modules,
            engine=engine,
            weights=plan.weights_format,
            group_size=plan.group_size,
        )
        for engine in plan.formats
    )


def _warnings(fidelity: tuple[Fidelity, ...]) -> list[str]:
    return [
        f"Rounding to {f.weights} for {f.engine} is louder than the adapter in {f.loud} of "
        f"{len(f.modules)} modules (median {f.noise:.1f} times); --adapter-mode side-path keeps "
        "it exact."
        for f in fidelity
        if f.loud
    ]


def _vision(plan: Plan) -> "Side | None":
    if plan.source.vision is None:
        return None
    from edgekit.export.vision_files import open_vision

    return open_vision(plan.source)


def _write(
    plan: Plan,
    side: "Side | None",
    work: Path,
    fidelity: tuple[Fidelity, ...],
    tell: Callable[[str], None],
) -> Manifest:
    tell("tokenizer")
    text_files.write_configs(plan.source, plan.config, work)
    text_files.write_tokenizer(plan.source, work)
    facts = None if side is None else _write_processor(plan, side, work)
    targets.check_serves(targets.load(plan.target), _manifest(plan, work, fidelity, facts))
    for engine in plan.formats:
        tell(f"write {engine}")
        (_write_openvino if engine == "openvino" else _write_onnx)(plan, side, work)
    manifest = _manifest(plan, work, fidelity, facts)
    write_manifest(work, manifest)
    return manifest


def _write_processor(plan: Plan, side: "Side", work: Path) -> VisionFacts:
    from edgekit.export.vision_files import write_processor
    from edgekit.sources.vlm import vision_facts

    assert plan.source.vision is not None
    write_processor(plan.source, work)
    facts = vision_facts(plan.source.vision, work, side.tokens)
    return replace(facts, image_mass=plan.config.spin_scores)


def _write_openvino(plan: Plan, side: "Side | None", work: Path) -> None:
    from edgekit.export.openvino_file import write_openvino

    config = plan.config_for("openvino")
    text_files.write_tokenizer_ir(work)
    write_openvino(
        config,
        plan.weights,
        work,
        weights_format=plan.weights_format,
        group_size=plan.group_size,
        calibration=_calibration_tokens(plan, work),
        side=plan.side,
    )
    if side is not None:
        from edgekit.export.vision_files import write_openvino_vision

        write_openvino_vision(side, config, plan.weights, work, weights_format=plan.weights_format)


def _calibration_tokens(plan: Plan, work: Path) -> np.ndarray | None:
    if plan.calibration is None:
        return None
    ids = _encoder(work)(plan.calibration[0])
    return np.array(ids, dtype=np.int64)


def _write_onnx(plan: Plan, side: "Side | None", work: Path) -> None:
    from edgekit.export.to_onnx import write_onnx

    config = plan.config_for("onnx")
    write_onnx(
        config,
        plan.weights,
        work,
        weights_format=plan.weights_format,
        ops=plan.onnx_ops,
        side=plan.side,
    )
    if side is not None:
        from edgekit.export.vision_files import write_onnx_vision

        write_onnx_vision(
            side,
            config,
            plan.weights,
            work,
            weights_format=plan.weights_format,
            contrib=plan.onnx_ops == "contrib",
        )


def _verify(
    plan: Plan, side: "Side | None", work: Path, tell: Callable[[str], None]
) -> dict[str, Verification]:
    ids = verification_tokens(_encoder(work), plan.config.context_limit)
    bounds = bounds_for(plan.weights_format, trained=plan.trained)
    weights = plan.weights if plan.reference is None else plan.reference
    results = {}
    for engine in plan.formats:
        tell(f"verify {engine}")
        results[engine] = verify_engine(work, engine, ids, plan.config, weights, bounds, side)
    return results


def _encoder(work: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _manifest(
    plan: Plan, work: Path, fidelity: tuple[Fidelity, ...], vision: VisionFacts | None
) -> Manifest:
    config = plan.config
    facts = ModelFacts(
        family=config.family,
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        context_length=config.context_limit,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        pad_token_id=config.pad_token_id,
        inputs=input_names(config),
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        source=plan.source.identity,
        model=facts,
        mixers=config.mixers,
        states=state_records(config),
        weights=plan.weights_format,
        engines=plan.formats,
        target=plan.target,
        pipeline=plan.manifest_steps(dump(fidelity)),
        versions=_versions(),
        files=describe_files(work),
        adapter_slots=slot_shapes(plan.side, plan.weights),
        vision=vision,
    )


def _versions() -> dict[str, str]:
    found = {"edgekit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _model_bytes(work: Path, manifest: Manifest, engine: str) -> int:
    files = (work / name for name in manifest.engine_files(engine))
    return sum(path.stat().st_size for path in files if path.is_file())


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
