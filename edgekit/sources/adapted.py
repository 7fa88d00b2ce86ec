"""A model with adapters: folded in fp32 when a tensor is read.

    W' = W + sum_i w_i f_i(layer) (fold_i(W) - W)

with w_i the weight of an adapter and f_i its factor by depth (`LiNeS`). Low-rank differences are
added as they are, so that a sum of several is exact; their factors are never averaged.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from edgekit.artefacts.lowrank import LowRank
from edgekit.artefacts.vector import Vector
from edgekit.errors import AdapterError, UsageError
from edgekit.models.config import DecoderConfig
from edgekit.models.weights import WeightStore
from edgekit.sources.adapter_kinds import Artefact
from edgekit.sources.adapters import EMBEDDING, HEAD, Adapter, AdapterChoice, open_adapter
from edgekit.sources.base import Source

__all__ = ["AdaptedStore", "LiNeS", "adapted"]

LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LiNeS:
    """A factor that grows with depth, so that shallow layers stay general (arXiv 2410.17146).

    Attributes:
        first: of the first layer.
        last: of the last layer; what lies outside the layers has it too.
    """

    first: float = 1.0
    last: float = 1.0

    def factor(self, module: str, layers: int) -> float:
        """Of one module."""
        found = LAYER.search(module)
        if found is None or layers < 2:
            return self.last
        return self.first + (self.last - self.first) * int(found[1]) / (layers - 1)


def adapted(
    source: Source,
    choices: Sequence[AdapterChoice],
    *,
    lines: LiNeS | None = None,
    untie: bool = False,
    student: str | None = None,
) -> tuple[DecoderConfig, "AdaptedStore"]:
    """A model with adapters merged into it.

    Args:
        source: the model; its tensors stay as they are.
        choices: the adapters, one or more.
        lines: a factor by depth for all of them.
        untie: where an adapter changes the head or the embedding of a model that has one matrix for
            both, give the head its own.
        student: sha256 of the student's tensors that will be put over it.

    Returns:
        The model's configuration and tensors.

    Raises:
        UsageError: if an adapter is given twice.
        AdapterError: as `open_adapter`, for a tied matrix without `untie`, or for an adapter that
            was trained on another student.
    """
    adapters = tuple(open_adapter(choice, source) for choice in choices)
    for adapter in adapters:
        _check_student(adapter, student)
    seen: dict[str, Path] = {}
    for adapter in adapters:
        if adapter.file.sha256 in seen or adapter.name in {path.name for path in seen.values()}:
            raise UsageError(
                f"adapter {adapter.file.directory} given, and another of its name or contents; "
                "allowed: each once, under a name of its own, its weights added up"
            )
        seen[adapter.file.sha256] = adapter.file.directory.resolve()
    config = _untied(source.config, adapters, untie)
    return config, AdaptedStore(source.weights, adapters, lines or LiNeS(), config)


@dataclass(frozen=True, slots=True)
class AdaptedStore:
    """The base's tensors with every adapter folded in; those that change are fp32."""

    base: WeightStore
    adapters: tuple[Adapter, ...]
    lines: LiNeS
    config: DecoderConfig
    modules: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Collect what changes."""
        names = {module for adapter in self.adapters for module in adapter.artefacts}
        object.__setattr__(self, "modules", frozenset(names))

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.base or self._is_untied_head(name)

    def __iter__(self) -> Iterator[str]:
        """Every name."""
        yield from self.base
        if self._is_untied_head(f"{HEAD}.weight"):
            yield f"{HEAD}.weight"

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`."""
        stored = f"{EMBEDDING}.weight" if self._is_untied_head(name) else name
        module, _, kind = name.rpartition(".")
        if module not in self.modules:
            return self.base.tensor(stored)
        if kind == "weight":
            return self._weight(module, self.base.tensor(stored))
        return self._bias(module, self.base.tensor(stored))

    def plain(self) -> "AdaptedStore":
        """The same without its adapters; an untied head stays apart."""
        return replace(self, adapters=())

    def difference(self, module: str) -> torch.Tensor:
        """What all adapters together add to a module's weight, fp32 `[out, in]`."""
        weight = self.base.tensor(self._stored(module)).float()
        total = torch.zeros_like(weight)
        for factor, artefact in self._changes(module):
            if isinstance(artefact, LowRank):
                total.addmm_(artefact.b.float(), artefact.a.float(), alpha=factor)
            else:
                total.add_(artefact.fold(weight) - weight, alpha=factor)
        return total

    def pairs(self, module: str) -> LowRank:
        """The adapters' pairs of a module side by side, factors folded in.

        Raises:
            AdapterError: if an adapter does something else to it.
        """
        changes = list(self._changes(module))
        if not all(isinstance(artefact, LowRank) for _, artefact in changes):
            raise AdapterError(f"{module}: an adapter that is no low-rank difference; merge it")
        return LowRank(
            a=torch.cat([a.a.float() for _, a in changes if isinstance(a, LowRank)]),
            b=torch.cat([f * a.b.float() for f, a in changes if isinstance(a, LowRank)], dim=1),
        )

    def _weight(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        merged = weight.float() + self.difference(module)
        if not merged.isfinite().all():
            raise AdapterError(f"{module}: the merged weight is not finite; lower the weights")
        return merged

    def _bias(self, module: str, bias: torch.Tensor) -> torch.Tensor:
        total = bias.float().clone()
        for factor, artefact in self._changes(module):
            if isinstance(artefact, Vector):
                total += factor * (artefact.fold_bias(bias) - bias.float())
        return total

    def _changes(self, module: str) -> Iterator[tuple[float, Artefact]]:
        scale = self.lines.factor(module, self.config.num_layers)
        for adapter in self.adapters:
            if module in adapter.artefacts:
                yield adapter.weight * scale, adapter.artefacts[module]

    def _stored(self, module: str) -> str:
        return (
            f"{EMBEDDING}.weight"
            if self._is_untied_head(f"{module}.weight")
            else (f"{module}.weight")
        )

    def _is_untied_head(self, name: str) -> bool:
        """A head that an adapter changes and the base shares with its embedding."""
        untied = name == f"{HEAD}.weight" and name not in self.base
        return untied and not self.config.tied_head


def _check_student(adapter: Adapter, student: str | None) -> None:
    """Refuse an adapter of a student that is not there; one of the plain model may go under any."""
    wanted = (adapter.tuning or {}).get("student") or {}
    if wanted.get("sha256") not in (None, student):
        raise AdapterError(
            f"{adapter.file.directory}: trained on the student {wanted.get('name')} (sha256 "
            f"{wanted['sha256'][:12]}); give --student with that one"
        )


def _untied(config: DecoderConfig, adapters: Sequence[Adapter], untie: bool) -> DecoderConfig:
    """The configuration, with a head of its own where an adapter needs one.

    Raises:
        AdapterError: if one needs it and `untie` is not given.
    """
    tied = {HEAD, EMBEDDING} if config.tied_head else set()
    touched = [a for a in adapters if tied & set(a.artefacts)]
    if not touched:
        return config
    if not untie:
        raise AdapterError(
            f"{touched[0].file.directory}: adapts the head, which this model shares with its "
            "embedding: merging would change both; give --untie for a head of its own"
        )
    return replace(config, tied_head=False)
