"""The matrices of adapters that may freeze one by one, in any PEFT tuner that has such.

A projection is called after its module and its part: `layers.3.self_attn.q_proj.aflora_A`.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

__all__ = ["PARTS", "Projection", "freeze", "is_frozen", "projections"]

PARTS = ("aflora_A", "aflora_B", "lora_A", "lora_B")  # attributes of PEFT's tuner layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One matrix of one adapter in one module.

    Attributes:
        module: name of the adapted module in the model.
        layer: PEFT's tuner layer there.
        part: of `PARTS`.
        adapter: name of the adapter.
    """

    module: str
    layer: nn.Module
    part: str
    adapter: str

    @property
    def name(self) -> str:
        """`module.part`."""
        return f"{self.module}.{self.part}"

    @property
    def parameter(self) -> nn.Parameter:
        """The matrix as it is now: PEFT replaces parameters when it changes their dtype."""
        held = getattr(self.layer, self.part)[self.adapter]
        return cast(nn.Parameter, held if isinstance(held, nn.Parameter) else held.weight)


def projections(model: nn.Module, adapter: str) -> dict[str, Projection]:
    """Every projection of `adapter` in `model` by its name, sorted."""
    found = [
        Projection(module=_plain(name), layer=module, part=part, adapter=adapter)
        for name, module in model.named_modules()
        for part in PARTS
        if adapter in getattr(module, part, ())
    ]
    return {projection.name: projection for projection in sorted(found, key=lambda p: p.name)}


def freeze(projection: Projection, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Stop training a projection, for good, and free what training it held.

    PEFT is told, so that switching adapters does not thaw it. The parameter keeps its place in the
    optimiser's groups: the groups of a resumed run have the same lengths.

    Args:
        projection: may be frozen already.
        optimizer: whose state of it is dropped.
    """
    layer, adapter, parameter = projection.layer, projection.adapter, projection.parameter
    told = dict(cast(dict[str, tuple[str, ...]], layer.frozen_peft_weight_names))
    told[adapter] = tuple(dict.fromkeys((*told.get(adapter, ()), projection.part)))
    layer.frozen_peft_weight_names = told  # type: ignore[assignment]
    parameter.requires_grad_(False)
    parameter.grad = None
    if optimizer is not None:
        optimizer.state.pop(parameter, None)


def is_frozen(projection: Projection) -> bool:
    """Whether `freeze` was called on it, in this process or before it was saved."""
    told = cast(dict[str, tuple[str, ...]], projection.layer.frozen_peft_weight_names)
    return projection.part in told.get(projection.adapter, ())


def _plain(name: str) -> str:
    """The module's name in the model that was adapted."""
    return name.removeprefix("base_model.model.")
