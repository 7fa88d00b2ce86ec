"""What is known of a device: a frozen dataclass, and for each setting where it comes from."""

import dataclasses
from dataclasses import dataclass

from edgekit.errors import UsageError

__all__ = ["ENGINES", "PROVENANCES", "WEIGHTS", "Target"]

ENGINES = ("openvino", "onnx")
WEIGHTS = ("fp32", "fp16", "int8", "int4")
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
        weights: default weight format of a conversion for this device.
        group_size: input columns that share one int4 scale (OpenVINO).
        prefill_block: tokens fed in one call while a prompt is read, per engine.
        inference_precision: arithmetic that the engine is asked for, such as `f32`.
        threads: CPU threads; None leaves the choice to the engine.
        provenance: for each setting above, `measured here`, `vendor document` or `open` (chosen,
            not yet checked on such a device), with a detail after a colon where there is one.
    """

    name: str
    description: str
    engine: str
    device: str
    weights: str
    group_size: int
    prefill_block: dict[str, int]
    inference_precision: str
    provenance: dict[str, str]
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check each value, and that no setting lacks its provenance.

        Raises:
            UsageError: naming the first setting that is not allowed.
        """
        self._one_of("engine", self.engine, ENGINES)
        self._one_of("weights", self.weights, WEIGHTS)
        for engine in ENGINES:
            self._positive(f"prefill_block.{engine}", self.prefill_block.get(engine))
        self._positive("group_size", self.group_size)
        if self.threads is not None:
            self._positive("threads", self.threads)
        self._check_provenance()

    def _one_of(self, field: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise UsageError(
                f"target {self.name}: {field} = {value!r}; allowed: {', '.join(allowed)}"
            )

    def _positive(self, field: str, value: int | None) -> None:
        if value is None or value < 1:
            raise UsageError(f"target {self.name}: {field} = {value!r}; allowed: 1 or more")

    def _check_provenance(self) -> None:
        settings = {f.name for f in dataclasses.fields(self)} - set(NOT_SETTINGS)
        if set(self.provenance) != settings:
            odd = sorted(set(self.provenance) ^ settings)
            raise UsageError(f"target {self.name}: provenance must name each setting once: {odd}")
        for field, text in self.provenance.items():
            self._one_of(f"provenance.{field}", text.split(":")[0], PROVENANCES)
