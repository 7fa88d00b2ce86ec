"""PEFT's adapter types as artefacts: what each does to the weight of a module.

LORA      W + s B A, s = alpha / r or alpha / sqrt(r) (arXiv 2106.09685); with a magnitude: DoRA
AFLORA    W + s diag(b) B diag(d) A (arXiv 2403.13269)
ADALORA   W + s / (r + 1e-5) B diag(E) A, r the initial rank (arXiv 2303.10512)
VERA      W + diag(b) B diag(d) A, A and B shared and cut to size (arXiv 2310.11454)
IA3       diag(l) W, or W diag(l) in feed-forward layers (arXiv 2205.05638)
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from edgekit.artefacts.lowrank import LowRank
from edgekit.artefacts.rescaled import Rescaled
from edgekit.artefacts.vector import Vector
from edgekit.errors import AdapterError, UsageError
from edgekit.runtime.adapter_file import AdapterFile
from edgekit.runtime.engine import Floats
from edgekit.runtime.lowrank import KINDS as LOW_RANK
from edgekit.runtime.lowrank import grouped

__all__ = ["Artefact", "adapter_kinds", "artefacts_of"]

Artefact = LowRank | Vector | Rescaled
Shapes = Mapping[str, tuple[int, int]]
MAGNITUDE = "lora_magnitude_vector"
VERA = ("vera_lambda_d", "vera_lambda_b")
SHARED = ("base_model.vera_A", "base_model.vera_B")


def artefacts_of(file: AdapterFile, shapes: Shapes) -> dict[str, Artefact]:
    """What an adapter does, by the module's name in the adapter, sorted.

    Args:
        file: the adapter.
        shapes: `[out, in]` of the weights that it may adapt, by module.

    Raises:
        AdapterError: for a type that is not known, tensors that are missing or do not fit
            together, or tensors that nothing here would read.
    """
    if file.kind not in READERS:
        known = ", ".join(adapter_kinds())
        raise AdapterError(f"{file.directory}: peft_type {file.kind!r} given; known: {known}")
    names, read = READERS[file.kind]
    modules, rest = grouped(file.tensors, names)
    rest = [name for name in rest if name not in SHARED or file.kind != "VERA"]
    if rest:
        raise AdapterError(
            f"{file.directory}: nothing reads {rest[0]}; allowed: {', '.join(names)} "
            "(no biases, embeddings or whole modules)"
        )
    if not modules:
        raise AdapterError(f"{file.directory}: holds no tensor {names[0]}; save the adapter again")
    try:
        return dict(sorted(read(file, modules, shapes)))
    except UsageError as cause:  # what the artefacts say of their tensors
        raise AdapterError(f"{file.directory}: {cause}") from cause


def adapter_kinds() -> list[str]:
    """The values of `peft_type` that can be merged."""
    return sorted(READERS)


Found = Iterable[tuple[str, Artefact]]
Modules = Mapping[str, Mapping[str, Floats]]


def _low_rank(file: AdapterFile, modules: Modules, shapes: Shapes) -> Found:
    """LoRA, DoRA and AFLoRA."""
    names, fold = LOW_RANK[file.kind]
    for module, parts in modules.items():
        try:
            pair = fold(module, tuple(_part(parts, name) for name in names), file.config)
        except AdapterError as cause:
            raise AdapterError(f"{file.directory}: {module}: {cause}") from cause
        lowrank = LowRank(a=torch.from_numpy(pair.a), b=torch.from_numpy(pair.b))
        if MAGNITUDE in parts:
            magnitude = torch.from_numpy(parts[MAGNITUDE]).flatten()
            yield module, Rescaled(pair=lowrank, magnitude=magnitude)
        else:
            yield module, lowrank


def _adalora(file: AdapterFile, modules: Modules, shapes: Shapes) -> Found:
    rank = float(file.config.get("init_r", 12))
    alpha = float(file.config.get("lora_alpha", 8))
    scale = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    for module, parts in modules.items():
        a, e, b = (torch.from_numpy(_part(parts, f"lora_{n}", module)) for n in "AEB")
        if len(a):  # every singular value may have been cut
            yield module, LowRank(a=a * e.reshape(-1, 1), b=scale * b)


def _vera(file: AdapterFile, modules: Modules, shapes: Shapes) -> Found:
    a, b = _projections(file, [shapes[module] for module in modules if module in shapes])
    for module, parts in modules.items():
        d, scale = (torch.from_numpy(_part(parts, name, module)) for name in VERA)
        out, width = shapes.get(module, (len(scale), a.shape[1]))
        if (len(d), len(scale)) != (len(a), out) or width > a.shape[1] or out > len(b):
            raise AdapterError(
                f"{file.directory}: {module}: vectors of {len(d)} and {len(scale)} given for a "
                f"weight {[out, width]} and rank {len(a)}; give the adapter's own model"
            )
        yield module, LowRank(a=d[:, None] * a[:, :width], b=scale[:, None] * b[:out])


def _projections(
    file: AdapterFile, shapes: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """VeRA's shared A `[r, in]` and B `[out, r]`: stored, or drawn again from their key as PEFT."""
    stored = [file.tensors[name] for name in SHARED if name in file.tensors]
    if len(stored) == len(SHARED):
        return torch.from_numpy(stored[0]), torch.from_numpy(stored[1])
    if not shapes:
        raise AdapterError(f"{file.directory}: none of its modules is in this model")
    random = torch.Generator().manual_seed(int(file.config.get("projection_prng_key", 0)))
    rank = int(file.config["r"])
    out, width = (max(sizes) for sizes in zip(*shapes, strict=True))
    drawn = []
    for size in ((rank, width), (out, rank)):
        bound = math.sqrt(6 / size[1])  # Kaiming's, for a gain of sqrt(2)
        drawn.append(torch.empty(size).uniform_(-bound, bound, generator=random))
    return drawn[0], drawn[1]


def _ia3(file: AdapterFile, modules: Modules, shapes: Shapes) -> Found:
    for module, parts in modules.items():
        scale = torch.from_numpy(parts["ia3_l"])
        inside = scale.dim() == 2 and scale.shape[0] == 1 and scale.shape[1] > 1
        yield module, Vector(scale=scale.flatten(), side="in" if inside else "out")


def _part(parts: Mapping[str, Floats], name: str, module: str = "") -> Floats:
    if name not in parts:
        where = f"{module}: " if module else ""
        raise AdapterError(f"{where}{name} is missing; save the adapter again")
    return parts[name]


Reader = Callable[[AdapterFile, Modules, Shapes], Found]
READERS: dict[str, tuple[tuple[str, ...], Reader]] = {
    "LORA": ((*LOW_RANK["LORA"][0], MAGNITUDE), _low_rank),
    "AFLORA": (LOW_RANK["AFLORA"][0], _low_rank),
    "ADALORA": (("lora_A", "lora_B", "lora_E"), _adalora),
    "VERA": (VERA, _vera),
    "IA3": (("ia3_l",), _ia3),
}
