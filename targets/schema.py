"""What is known of a device: a frozen dataclass, and for each setting where it comes from."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.errors import UsageError

__all__ = ["ENGINES", "GRAPHS", "HINTS", "PRECISIONS", "PROVENANCES", "WEIGHTS", "Target"]

ENGINES = ("openvino", "onnx")
WEIGHTS = ("fp32", "fp16", "int8", "int4")
GRAPHS = ("dynamic", "stepped", "static")
PRECISIONS = ("f32", "f16", "bf16")
HINTS = {  # properties of OpenVINO, and the values that it allows
    "PERFORMANCE_HINT": ("LATENCY", "THROUGHPUT"),
    "SCHEDULING_CORE_TYPE": ("ANY_CORE", "PCORE_ONLY", "ECORE_ONLY"),
    "ENABLE_HYPER_THREADING": ("YES", "NO"),
    "ENABLE_CPU_PINNING": ("YES", "NO"),
}
PROVENANCES = ("measured here", "vendor document", "open")
NOT_SETTINGS = ("name", "description", "provenance")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Default settings for one kind of device.

    Attributes:
        name: the profile's file name without `.toml`.
        description: which devices it is for.
        engine: the engine to prefer, `openvino` or `onnx`.
        device: the engine's device name, such as `CPU`.
        graph: `dynamic` for one graph of any number of tokens; `stepped` for that and one of fixed
            shapes for a single token, where no layer's state grows and memory allows both;
            `static` for one of a chunk and one of a step, batch 1 (`export.static_shapes`).
        weights: default weight format of a conversion for this device.
        group_size: input columns that share one int4 scale (OpenVINO).
        prefill_block: tokens fed in one call while a prompt is read, per engine.
        inference_precision: arithmetic that the engine is asked for, such as `f32`.
        memory_budget: share of the machine's memory that a bundle's weights may have on disk.
        threads: CPU threads; None leaves the choice to the engine.
        hints: properties of OpenVINO by name, those of `HINTS`.
        cache_dir: where OpenVINO keeps compiled blobs, `~` for the user's home; None: nowhere.
        provenance: for each setting above, `measured here`, `vendor document` or `open` (chosen,
            not yet checked on such a device), with a detail after a colon where there is one.
    """

    name: str
    description: str
    engine: str
    device: str
    graph: str
    weights: str
    group_size: int
    prefill_block: dict[str, int]
    inference_precision: str
    memory_budget: float
    provenance: dict[str, str]
    threads: int | None = None
    hints: dict[str, str] = field(default_factory=dict)
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Check each value, and that no setting lacks its provenance.

        Raises:
            UsageError: naming the first setting that is not allowed.
        """
        self._one_of("engine", self.engine, ENGINES)
        self._one_of("graph", self.graph, GRAPHS)
        self._one_of("weights", self.weights, WEIGHTS)
        self._one_of("inference_precision", self.inference_precision, PRECISIONS)
        for engine in ENGINES:
            self._positive(f"prefill_block.{engine}", self.prefill_block.get(engine))
        self._positive("group_size", self.group_size)
        if self.threads is not None:
            self._positive("threads", self.threads)
        if not 0 < self.memory_budget <= 1:
            self._refuse("memory_budget", self.memory_budget, "above 0, at most 1")
        for hint, value in self.hints.items():
            self._one_of("hints", hint, tuple(HINTS))
            self._one_of(f"hints.{hint}", value, HINTS[hint])
        self._check_provenance()

    @property
    def cache_path(self) -> Path | None:
        """`cache_dir` of this user."""
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser()

    def _one_of(self, name: str, value: str, allowed: Sequence[str]) -> None:
        if value not in allowed:
            self._refuse(name, value, ", ".join(allowed))

    def _positive(self, name: str, value: int | None) -> None:
        if value is None or value < 1:
            self._refuse(name, value, "1 or more")

    def _refuse(self, name: str, value: object, allowed: str) -> None:
        raise UsageError(f"target {self.name}: {name} = {value!r}; allowed: {allowed}")

    def _check_provenance(self) -> None:
        settings = {f.name for f in dataclasses.fields(self)} - set(NOT_SETTINGS)
        if set(self.provenance) != settings:
            odd = sorted(set(self.provenance) ^ settings)
            raise UsageError(f"target {self.name}: provenance must name each setting once: {odd}")
        for name, text in self.provenance.items():
            self._one_of(f"provenance.{name}", text.split(":")[0], PROVENANCES)
