"""The checked arguments of one conversion; what can be refused is refused here."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgekit import targets
from edgekit.config import dump
from edgekit.errors import EngineError, UsageError
from edgekit.export.side_paths import (
    NO_SIDE_PATHS,
    SidePaths,
    check_linear,
    chosen_slots,
    linear_modules,
)
from edgekit.mixers.base import mixer_type
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import with_fresh_mixers
from edgekit.models.spin import SpinConfig
from edgekit.models.weights import WeightStore
from edgekit.sources import Source
from edgekit.sources.adapted import AdaptedStore, LiNeS, adapted
from edgekit.sources.adapters import Adapter, AdapterChoice
from edgekit.sources.base import sha256_of
from edgekit.sources.student import Student, apply_student, read_student
from edgekit.staging import MARKERS
from edgekit.targets.schema import ENGINES, WEIGHTS

__all__ = ["Plan", "check_choices", "make_plan"]

ONNX_OPS = ("contrib", "portable")
ADAPTER_MODES = ("merge", "side-path")
STATE_SHARING = ("q_head", "kv_head")
OPTIONS = ("lawcat", "lolcats")  # mixers whose options stand in the configuration
DEFAULT_MIXER = "softmax"
PACKAGES = {"openvino": "openvino", "onnx": "onnxruntime"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `convert` will do.

    Attributes:
        source: where the model comes from.
        config: the decoder to export, with a mixer per layer.
        weights: its tensors, fresh ones included.
        weights_format: `fp32`, `fp16`, `int8` or `int4`.
        group_size: input columns per int4 scale of the OpenVINO graph.
        formats: engines to write for.
        onnx_ops: operator set of the ONNX graph.
        target: name of the device profile.
        calibration: text for data-aware int4 of the OpenVINO graph, and its file's name.
        student: what the mixers were trained as; None where they are the source's or fresh.
        adapters: what is merged into the weights, or stands beside them.
        adapter_mode: `merge` or `side-path`.
        lines: factor of the adapters by depth.
        plain: the tensors without the adapters; None where there are none.
        reference: what the bundle must say; None: `weights`.
        side: adapters that stay beside the weights, and slots for others at run time.
    """

    source: Source
    config: DecoderConfig
    weights: WeightStore
    weights_format: str
    group_size: int
    formats: tuple[str, ...]
    onnx_ops: str
    target: str
    calibration: tuple[str, str] | None
    student: Student | None = None
    adapters: tuple[Adapter, ...] = ()
    adapter_mode: str = "merge"
    lines: LiNeS = field(default_factory=LiNeS)
    plain: WeightStore | None = None
    reference: WeightStore | None = None
    side: SidePaths = NO_SIDE_PATHS

    @property
    def adapted_modules(self) -> frozenset[str]:
        """Modules that an adapter changes."""
        return frozenset(module for adapter in self.adapters for module in adapter.artefacts)

    @property
    def trained(self) -> bool:
        """Whether every mixer's tensors came with the source or a student."""
        return self.student is not None or set(self.config.mixers) == {"softmax"}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the result."""
        untrained = "The recurrent layers are not distilled: the model is fast, and talks nonsense."
        return self.source.notes if self.trained else (*self.source.notes, untrained)

    def config_for(self, engine: str) -> DecoderConfig:
        """The decoder as one engine's graph has it.

        OpenVINO GenAI says where pictures lie to Gemma3 alone, as `token_type_ids`; to others the
        embeddings have to say it.
        """
        if engine != "openvino" or self.config.reads == "tokens":
            return self.config
        if self.config.image_attention == "bidirectional":
            return replace(self.config, image_input="token_type_ids")
        return replace(self.config, image_flag=self.config.reads_images)

    def progress_steps(self, verify: bool) -> list[str]:
        """What the progress bar counts."""
        writing = [f"write {engine}" for engine in self.formats]
        checking = [f"verify {engine}" for engine in self.formats] if verify else []
        adapting = ["measure adapters"] if self.adapters and self.adapter_mode == "merge" else []
        return [*adapting, "tokenizer", *writing, *checking, "checksums"]

    def manifest_steps(self, fidelity: Sequence[Any] = ()) -> tuple[dict[str, Any], ...]:
        """The pipeline with its settings, as the manifest keeps it.

        Args:
            fidelity: JSON-ready, what rounding left of the adapters.
        """
        steps: list[dict[str, Any]] = [{"step": "load", "notes": list(self.source.notes)}]
        if self.adapters:
            steps.append(self._adapters_step(fidelity))
        if self.student is not None:
            steps.append(_student_step(self.student))
        if not self.trained:
            options = {n: dump(getattr(self.config, n)) for n in OPTIONS if n in self.config.mixers}
            steps.append({"step": "mixers", "trained": False, **options})
        if self.config.spin is not None:
            steps.append({"step": "spin", **dump(self.config.spin)})
        if self.side.slots:
            steps.append({"step": "adapter slots", "modules": len(self.side.slots)})
        steps.append({"step": "weights", "format": self.weights_format})
        if "openvino" in self.formats:
            steps.append(self._openvino_step())
        if "onnx" in self.formats:
            steps.append({"step": "onnx", "ops": self.onnx_ops})
        return tuple(steps)

    def _adapters_step(self, fidelity: Sequence[Any]) -> dict[str, Any]:
        return {
            "step": "adapters",
            "mode": self.adapter_mode,
            "lines": dump(self.lines),
            "adapters": [_adapter_record(adapter) for adapter in self.adapters],
            "fidelity": list(fidelity),
        }

    def _openvino_step(self) -> dict[str, Any]:
        step: dict[str, Any] = {"step": "openvino"}
        if self.weights_format == "int4":
            step["group_size"] = self.group_size
        if self.calibration is not None:
            step["calibration"] = self.calibration[1]
        return step


def _adapter_record(adapter: Adapter) -> dict[str, Any]:
    tuning = adapter.tuning or {}
    return {
        "name": adapter.name,
        "kind": adapter.file.kind,
        "weight": adapter.weight,
        "sha256": adapter.file.sha256,
        "modules": len(adapter.artefacts),
        "trained_on": {"base": tuning.get("base"), "student": tuning.get("student")},
    }


def _student_step(student: Student) -> dict[str, Any]:
    manifest = student.manifest
    return {
        "step": "student",
        "name": manifest.name,
        "base": manifest.base["sha256"],
        "recipe": manifest.recipe.get("name"),
        "training": dump(manifest.training),
        "lawcat": dump(manifest.lawcat),
        "lolcats": dump(manifest.lolcats),
        "sha256": sha256_of([student.directory / MARKERS["student"]]),
    }


def check_choices(
    *,
    student: str | Path | None,
    mixer: str | None,
    state_sharing: str | None,
    softmax_layers: Sequence[int],
    weights: str | None,
    formats: Sequence[str],
    onnx_ops: str | None,
    verify: bool,
    adapters: Sequence[AdapterChoice] = (),
    adapter_mode: str | None = None,
    lines: LiNeS | None = None,
    untie: bool = False,
) -> None:
    """Refuse what no source could make right.

    Raises:
        UsageError: for a value that is not allowed, or that nothing would read.
        EngineError: if an engine that the verification needs is not installed.
    """
    given = [("weights", weights, (None, *WEIGHTS)), ("onnx_ops", onnx_ops, (None, *ONNX_OPS))]
    given += [("format", name, ENGINES) for name in formats]
    given += [("state_sharing", state_sharing, (None, *STATE_SHARING))]
    given += [("adapter_mode", adapter_mode, (None, *ADAPTER_MODES))]
    for name, value, allowed in given:
        if value not in allowed:
            known = ", ".join(str(a) for a in allowed if a)
            raise UsageError(f"{name} {value!r} given; allowed: {known}")
    if not formats:
        raise UsageError(f"no format given; allowed: {', '.join(ENGINES)}")
    if (adapter_mode or lines or untie) and not adapters:
        raise UsageError("adapter_mode, lines or untie given without an adapter; give one")
    _check_mixers(student, mixer, bool(state_sharing or softmax_layers))
    if state_sharing and mixer != "lawcat":
        raise UsageError(f"state_sharing {state_sharing!r} given for {mixer}; allowed: with lawcat")
    if onnx_ops and "onnx" not in formats:
        raise UsageError(f"onnx_ops {onnx_ops!r} given without the onnx format")
    for engine in formats:
        if verify and find_spec(PACKAGES[engine]) is None:
            raise EngineError(
                f"{PACKAGES[engine]} is not installed, so the {engine} graph cannot be verified: "
                f'pip install "edgekit-lm[{engine}]", or leave the format out'
            )


def _check_mixers(student: str | Path | None, mixer: str | None, options: bool) -> None:
    if student is not None and (mixer or options):
        raise UsageError(
            f"mixer, state_sharing or softmax_layers given with student {str(student)!r}, "
            "which says them itself; leave them out"
        )
    mixer_type(mixer or DEFAULT_MIXER)
    if (mixer or DEFAULT_MIXER) == "softmax" and options:
        raise UsageError("state_sharing and softmax_layers need another mixer, such as lawcat")


def make_plan(
    source: Source,
    *,
    student: str | Path | None,
    mixer: str | None,
    state_sharing: str | None,
    softmax_layers: Sequence[int],
    weights: str | None,
    formats: Sequence[str],
    target: str,
    onnx_ops: str | None,
    calibration: str | Path | None,
    adapters: Sequence[AdapterChoice] = (),
    adapter_mode: str | None = None,
    lines: LiNeS | None = None,
    untie: bool = False,
    adapter_slots: str | Sequence[str] = (),
    spin: SpinConfig | None = None,
    spin_scores: bool = False,
) -> Plan:
    """Fit checked choices to a source.

    Raises:
        UsageError: for a layer, target or calibration text that does not fit.
        SourceError: for a student that is missing, damaged or of another base.
        AdapterError: for an adapter that cannot be read or does not fit.
    """
    profile = targets.load(targets.detect() if target == "auto" else target)
    chosen = weights or profile.weights
    if calibration and (chosen != "int4" or "openvino" not in formats):
        raise UsageError("a calibration text serves int4 weights of the openvino format only")
    if calibration and source.vision is not None:
        raise UsageError("a calibration text serves models that read text alone; leave it out")
    source = replace(source, config=_seeing(source, spin, scores=spin_scores))
    opened = None if student is None else read_student(student)

    def mixed(model: Source) -> tuple[DecoderConfig, WeightStore]:
        if opened is not None:
            return apply_student(model, opened)
        config = _with_mixers(model, mixer or DEFAULT_MIXER, state_sharing, softmax_layers)
        return config, with_fresh_mixers(config, model.weights)

    found: tuple[Adapter, ...] = ()
    mode, plain, merged = adapter_mode or ADAPTER_MODES[0], None, source
    beside: AdaptedStore | None = None
    if adapters:
        under = None if opened is None else opened.sha256
        untied, store = adapted(source, adapters, lines=lines, untie=untie, student=under)
        merged, found = replace(source, config=untied, weights=store), store.adapters
        plain = mixed(replace(merged, weights=store.plain()))[1]
        beside = store if mode == "side-path" else None
    config, tensors = mixed(merged)
    return Plan(
        source=source,
        config=config,
        weights=plain if plain is not None and mode == "side-path" else tensors,
        reference=tensors,
        plain=plain,
        adapters=found,
        adapter_mode=mode,
        side=_side_paths(config, beside, adapter_slots),
        lines=lines or LiNeS(),
        weights_format=chosen,
        group_size=profile.group_size,
        formats=tuple(dict.fromkeys(formats)),
        onnx_ops=onnx_ops or "contrib",
        target=profile.name,
        calibration=_read_text(Path(calibration)) if calibration else None,
        student=opened,
    )


def _seeing(source: Source, spin: SpinConfig | None, *, scores: bool) -> DecoderConfig:
    """The decoder's configuration, with what pictures ask of it."""
    if source.vision is not None:
        if scores and spin is None:
            spin = SpinConfig(suppress=0)
        return replace(source.config, reads="embeddings", spin=spin, spin_scores=scores)
    if spin is not None or scores:
        raise UsageError(
            f"{'spin' if spin is not None else 'spin_scores'} given for {source.name}, which reads "
            "no pictures; give a vision-language model"
        )
    return source.config


def _side_paths(
    config: DecoderConfig, beside: AdaptedStore | None, slots: str | Sequence[str]
) -> SidePaths:
    constant = {}
    if beside is not None:
        check_linear(sorted(beside.modules), linear_modules(config), "adapter_mode side-path")
        constant = {module: beside.pairs(module) for module in beside.modules}
    return SidePaths(constant=constant, slots=chosen_slots(slots, config))


def _with_mixers(
    source: Source, mixer: str, state_sharing: str | None, softmax_layers: Sequence[int]
) -> DecoderConfig:
    layers = source.config.num_layers
    outside = [i for i in softmax_layers if not 0 <= i < layers]
    if outside:
        raise UsageError(f"softmax layer {outside[0]} given; allowed: 0 to {layers - 1}")
    mixers = tuple("softmax" if i in softmax_layers else mixer for i in range(layers))
    lawcat = replace(source.config.lawcat, state_sharing=state_sharing or "q_head")  # type: ignore[arg-type]
    return source.config.with_mixers(mixers, lawcat)


def _read_text(path: Path) -> tuple[str, str]:
    """A calibration file's text and name."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise UsageError(
            f"calibration text {path}: cannot be read ({cause}); give UTF-8"
        ) from cause
    if not text.strip():
        raise UsageError(f"calibration text {path} is empty; give some paragraphs")
    return text, path.name
