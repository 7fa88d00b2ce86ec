"""Adapters on disk, opened over the model that they were trained on, and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgekit.artefacts.lowrank import LowRank
from edgekit.errors import AdapterError, UsageError
from edgekit.models.weights import WeightStore
from edgekit.runtime.adapter_file import AdapterFile, read_adapter
from edgekit.sources.adapter_kinds import Artefact, artefacts_of
from edgekit.sources.base import Source, read_json

__all__ = ["EMBEDDING", "HEAD", "Adapter", "AdapterChoice", "open_adapter", "parse_choice"]

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
COPY = ".base_layer.weight"
TUNING = "tune.json"  # what `edgekit tune` writes beside an adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterChoice:
    """An adapter that the user asked for.

    Attributes:
        path: its directory.
        weight: of its difference; not 0.
    """

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the weight.

        Raises:
            UsageError: for 0 or what is not finite.
        """
        if not self.weight or abs(self.weight) == float("inf") or self.weight != self.weight:
            raise UsageError(
                f"adapter {self.path}: weight {self.weight:g} given; allowed: a finite number "
                "other than 0; leave the adapter out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An opened adapter that fits a model.

    Attributes:
        name: of its directory.
        weight: of its difference.
        file: as it was read.
        artefacts: what it does, by module of the model (`model.layers.0.self_attn.q_proj`).
        tuning: what `edgekit tune` wrote of how it was made; None for others.
    """

    name: str
    weight: float
    file: AdapterFile
    artefacts: Mapping[str, Artefact]
    tuning: Mapping[str, Any] | None = None

    @property
    def low_rank(self) -> bool:
        """Whether it is low-rank differences only, which can stay beside the weights."""
        return all(isinstance(artefact, LowRank) for artefact in self.artefacts.values())


def parse_choice(text: str) -> AdapterChoice:
    """`PATH` or `PATH:WEIGHT`; a directory of the whole name comes first.

    Raises:
        UsageError: for a weight that is not allowed.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return AdapterChoice(path=Path(text))
    try:
        return AdapterChoice(path=Path(path), weight=float(weight))
    except ValueError as cause:
        raise UsageError(
            f"adapter {text!r} given; allowed: PATH or PATH:WEIGHT, such as adapter:0.5"
        ) from cause


def open_adapter(choice: AdapterChoice, source: Source) -> Adapter:
    """Open an adapter for a model.

    Args:
        choice: which one.
        source: the model that it was trained on.

    Raises:
        AdapterError: if it cannot be read, is of another model, or nothing of it fits.
    """
    file = _without_copies(read_adapter(choice.path), source)
    path = choice.path / TUNING
    tuning = read_json(path) if path.is_file() else None
    _check_base(choice.path, tuning, source)
    names = {_in_adapter(name, file): name for name in _matrices(source.weights)}
    shapes = {short: _shape(source.weights, name) for short, name in names.items()}
    found = artefacts_of(file, shapes)
    for module, artefact in found.items():
        if module not in shapes:
            raise AdapterError(
                f"{choice.path}: adapts {module}, which {source.name} has not; give the adapter's "
                "own model"
            )
        if not artefact.fits(shapes[module]):
            raise AdapterError(
                f"{choice.path}: {module} of {source.name} is {list(shapes[module])}, which the "
                "adapter does not fit; give the adapter's own model"
            )
    return Adapter(
        name=choice.path.resolve().name,
        weight=choice.weight,
        file=file,
        artefacts={names[module]: artefact for module, artefact in found.items()},
        tuning=tuning,
    )


def _without_copies(file: AdapterFile, source: Source) -> AdapterFile:
    """Leave out the embedding or head as it was, which PEFT saves beside its difference.

    Raises:
        AdapterError: if it is not as the model has it.
    """
    kept = dict(file.tensors)
    for name in [name for name in kept if name.endswith(COPY)]:
        stored = source.weights.tensor(_stored(name.removesuffix(COPY), source.weights))
        if not torch.equal(torch.from_numpy(kept.pop(name)), stored.float()):
            raise AdapterError(
                f"{file.directory}: {name} is not as {source.name} has it; give the adapter's own "
                "model"
            )
    return replace(file, tensors=kept)


def _stored(module: str, weights: WeightStore) -> str:
    """The name of a module's weight; a tied head has that of the embedding."""
    name = f"{module}.weight"
    return f"{EMBEDDING}.weight" if module == HEAD and name not in weights else name


def _matrices(weights: WeightStore) -> set[str]:
    """Modules whose weight is a matrix, the head of a tied model among them."""
    names = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    return {n for n in names if not n.endswith("norm")} | {HEAD}


def _shape(weights: WeightStore, module: str) -> tuple[int, int]:
    shape = weights.tensor(_stored(module, weights)).shape
    return (shape[0], shape[-1])


def _in_adapter(module: str, file: AdapterFile) -> str:
    """A module's name in the adapter: one trained on the model without its head drops `model.`."""
    short = module.removeprefix("model.")
    headless = any(name.startswith("layers.") for name in file.tensors)
    return short if headless else module


def _check_base(path: Path, tuning: Mapping[str, Any] | None, source: Source) -> None:
    base = (tuning or {}).get("base") or {}
    wanted, found = base.get("sha256"), source.identity.get("sha256")
    if wanted is not None and wanted != found:
        raise AdapterError(
            f"{path}: trained on {base.get('name')} (sha256 {str(wanted)[:12]}), not on "
            f"{source.name} (sha256 {str(found)[:12]}); give the model that it was trained on"
        )
