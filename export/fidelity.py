"""How much of an adapter is left after its weights are rounded: module by module.

With Q the rounding of a weight format, D the difference that adapters make to W, and what is left
of it D' = Q(W + D) - Q(W):

    kept = <D', D> / <D, D>       1 if D survives, 0 if it vanishes
    noise = |D' - D| / |D|        of the rounding, against the adapter; above 1 it is the louder

Rounding to a grid coarser than D moves few weights but each by a whole step, so that D is kept on
the average and drowned in noise: both figures are needed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch

from edgekit.export.blockwise import dequantise, quantise
from edgekit.models.weights import WeightStore

__all__ = ["LOUD", "Fidelity", "ModuleFidelity", "measure_fidelity", "rounding"]

LOUD = 1.0
Round = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleFidelity:
    """One module.

    Attributes:
        module: its path.
        ratio: rms of the difference over rms of the weight.
        kept: see above.
        noise: see above.
    """

    module: str
    ratio: float
    kept: float
    noise: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """All modules of one graph.

    Attributes:
        engine: whose rounding it is.
        weights: the format.
        kept: median over the modules.
        noise: median over the modules.
        loud: modules in which the rounding is louder than the adapter.
        modules: those that change, in the model's order.
    """

    engine: str
    weights: str
    kept: float
    noise: float
    loud: int
    modules: tuple[ModuleFidelity, ...]


def measure_fidelity(
    before: WeightStore,
    after: WeightStore,
    modules: Iterable[str],
    *,
    engine: str,
    weights: str,
    group_size: int = 64,
) -> Fidelity:
    """Round every module's weight with and without the adapters.

    Args:
        before: tensors without them.
        after: tensors with them.
        modules: that they change.
        engine: `openvino` or `onnx`.
        weights: `fp32`, `fp16`, `int8` or `int4`.
        group_size: of OpenVINO's int4.
    """
    rounded = rounding(engine, weights, group_size)
    found = []
    for module in sorted(modules, key=_order):
        old, new = (store.tensor(f"{module}.weight").float() for store in (before, after))
        difference = (new - old).double()
        energy = float(difference.square().sum())
        if not energy:
            continue
        left = rounded(new).double() - rounded(old).double()
        found.append(
            ModuleFidelity(
                module=module,
                ratio=float((difference.square().mean() / old.double().square().mean()).sqrt()),
                kept=float((left * difference).sum()) / energy,
                noise=float((left - difference).norm()) / energy**0.5,
            )
        )
    return Fidelity(
        engine=engine,
        weights=weights,
        kept=median(module.kept for module in found) if found else 1.0,
        noise=median(module.noise for module in found) if found else 0.0,
        loud=sum(module.noise > LOUD for module in found),
        modules=tuple(found),
    )


def rounding(engine: str, weights: str, group_size: int) -> Round:
    """What an engine's graph makes of a matrix `[out, in]`; fp32 in, fp32 out."""
    if weights == "fp32":
        return lambda weight: weight
    if weights == "fp16":
        return lambda weight: weight.half().float()
    if engine == "onnx":
        bits = 8 if weights == "int8" else 4
        return lambda w: torch.from_numpy(dequantise(quantise(w.numpy(), bits)))  # type: ignore[arg-type]
    if weights == "int8":
        return lambda weight: _symmetric(weight, weight.shape[1], 8)
    return lambda weight: _symmetric(weight, group_size, 4)


def _symmetric(weight: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """NNCF's symmetric rounding without data: one scale per group of columns of each row.

    The scale is the largest weight over 2^(bits - 1), so signed that it meets the lowest integer.
    """
    while weight.shape[1] % group:
        group //= 2  # NNCF adjusts a group that does not divide the row
    lowest = -(2 ** (bits - 1))
    w = weight.reshape(len(weight), -1, group)
    top, bottom = w.amax(dim=-1, keepdim=True), -w.amin(dim=-1, keepdim=True)
    scale = torch.where(bottom >= top, bottom, -top) / -lowest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (w / scale).round().clamp(lowest, -lowest - 1)
    return (q * scale.half().float()).reshape(weight.shape)  # scales are stored in 16 bits


def _order(module: str) -> list[tuple[int, str]]:
    """By layer number, then by name."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in module.split(".")]
