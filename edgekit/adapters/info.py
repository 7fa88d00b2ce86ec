"""What an adapter on disk holds, without its model."""

from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import AdapterError
from edgekit.runtime.adapter_file import TENSORS, AdapterFile, read_adapter
from edgekit.runtime.lowrank import low_rank_pairs
from edgekit.sources.adapter_kinds import adapter_kinds

__all__ = ["AdapterInfo", "adapter_info"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """An adapter in figures.

    Attributes:
        kind: PEFT's type.
        base: the model that it names as its own; None if it names none.
        modules: that it adapts, sorted.
        targets: the last parts of their names, sorted.
        ranks: the different ranks, rising; empty for what has none.
        parameters: elements of its tensors.
        bytes: of its tensors' file.
        low_rank: whether it can stay beside the weights, at run time.
        frozen_at: steps at which projections were frozen, rising.
        sha256: of its tensors.
    """

    kind: str
    base: str | None
    modules: tuple[str, ...]
    targets: tuple[str, ...]
    ranks: tuple[int, ...]
    parameters: int
    bytes: int
    low_rank: bool
    frozen_at: tuple[int, ...]
    sha256: str


def adapter_info(directory: str | Path) -> AdapterInfo:
    """Read an adapter.

    Raises:
        AdapterError: if it cannot be read or is of a type that is not known.
    """
    file = read_adapter(directory)
    if file.kind not in adapter_kinds():
        known = ", ".join(adapter_kinds())
        raise AdapterError(f"{directory}: peft_type {file.kind!r} given; known: {known}")
    modules = sorted({name.removesuffix(".weight").rpartition(".")[0] for name in file.tensors})
    modules = [module for module in modules if "." in module]  # VeRA's shared matrices are nobody's
    return AdapterInfo(
        kind=file.kind,
        base=file.config.get("base_model_name_or_path"),
        modules=tuple(modules),
        targets=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        ranks=tuple(sorted(_ranks(file))),
        parameters=sum(tensor.size for tensor in file.tensors.values()),
        bytes=(file.directory / TENSORS).stat().st_size,
        low_rank=_is_low_rank(file),
        frozen_at=tuple(sorted(e["step"] for e in file.config.get("freeze_log") or [])),
        sha256=file.sha256,
    )


def _ranks(file: AdapterFile) -> set[int]:
    downs = ("lora_A", "aflora_A", "vera_lambda_d")
    return {len(t) for n, t in file.tensors.items() if n.removesuffix(".weight").endswith(downs)}


def _is_low_rank(file: AdapterFile) -> bool:
    try:
        low_rank_pairs(file)
    except AdapterError:
        return False
    return True
