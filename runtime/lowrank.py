"""Adapters that are differences B A of low rank to a weight, whatever method made them.

    LoRA      B A of the file, times alpha / r, or alpha / sqrt(r) for rsLoRA
    AFLoRA    A = diag(d) A,  B = s diag(b) B    (arXiv 2403.13269)

with the scale folded into B, so that a runtime only ever sees pairs and a weight for each adapter.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import AdapterError
from edgekit.runtime.adapter_file import AdapterFile, by_pattern
from edgekit.runtime.engine import Floats

__all__ = ["KINDS", "Pair", "balanced", "grouped", "joined", "low_rank_pairs"]

LORA = ("lora_A", "lora_B")
AFLORA = ("aflora_A", "aflora_B", "aflora_d", "aflora_b")
SMALLEST = np.float32(1e-38)

Parts = Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Pair:
    """A difference B A to the weight `[out, in]` of one module; fp32.

    Attributes:
        a: `[r, in]`.
        b: `[out, r]`.

    Raises:
        AdapterError: if the shapes do not fit together.
    """

    a: Floats
    b: Floats

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise AdapterError(
                f"A {list(self.a.shape)} and B {list(self.b.shape)} do not fit together; "
                "allowed: A [r, in] and B [out, r]"
            )

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the weight that it fits."""
        return len(self.b), int(self.a.shape[1])


def low_rank_pairs(file: AdapterFile) -> dict[str, Pair]:
    """What an adapter adds, by the module's name (`model.layers.0.self_attn.q_proj`), sorted.

    Raises:
        AdapterError: if it is of a kind that is no low-rank difference, a tensor is missing or of
            a wrong shape, or there is one that a difference has no place for.
    """
    if file.kind not in KINDS:
        raise AdapterError(
            f"{file.directory}: peft_type {file.kind!r} given; allowed here: {', '.join(KINDS)} "
            "(edgekit convert --adapter merges some others)"
        )
    names, fold = KINDS[file.kind]
    modules, rest = grouped(file.tensors, names)
    if rest:
        raise AdapterError(
            f"{file.directory}: {rest[0]} is more than a low-rank difference, which it would lose; "
            "merge it: edgekit convert --adapter"
        )
    if not modules:
        raise AdapterError(f"{file.directory}: holds no tensor {names[0]}; save the adapter again")
    pairs = {}
    for module, parts in sorted(modules.items()):
        try:
            pairs[module] = fold(module, _complete(parts, names), file.config)
        except AdapterError as cause:
            raise AdapterError(f"{file.directory}: {module}: {cause}") from cause
    return pairs


def grouped(
    tensors: Mapping[str, Floats], names: tuple[str, ...]
) -> tuple[dict[str, dict[str, Floats]], list[str]]:
    """Tensors by module and part, and the names of those that are none of the parts `names`."""
    modules: dict[str, dict[str, Floats]] = {}
    rest = []
    for name, tensor in tensors.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part in names:
            modules.setdefault(module, {})[part] = tensor
        else:
            rest.append(name)
    return modules, rest


def joined(pairs: list[tuple[float, Pair]]) -> Pair:
    """The exact weighted sum of differences: ranks side by side, weights in B.

    Args:
        pairs: one or more that fit the same weight.
    """
    return Pair(
        a=np.concatenate([pair.a for _, pair in pairs]),
        b=np.concatenate([np.float32(weight) * pair.b for weight, pair in pairs], axis=1),
    )


def balanced(pair: Pair) -> Pair:
    """The same B A, row j of A and column j of B of one norm, far from the ends of fp16."""
    down, up = np.linalg.norm(pair.a, axis=1), np.linalg.norm(pair.b, axis=0)
    usable = (down > 0) & (up > 0)
    factor = np.where(usable, np.sqrt(up / np.maximum(down, SMALLEST)), 1).astype(np.float32)
    return Pair(a=pair.a * factor[:, None], b=pair.b / factor)


def _complete(parts: Parts, names: tuple[str, ...]) -> tuple[Floats, ...]:
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterError(f"{missing[0]} is missing; save the adapter again")
    return tuple(parts[name] for name in names)


def _lora(module: str, parts: tuple[Floats, ...], config: Mapping[str, Any]) -> Pair:
    a, b = parts
    rank = by_pattern(config.get("rank_pattern"), module, config.get("r"))
    if a.shape[0] != rank or not rank:
        raise AdapterError(f"A {list(a.shape)} given for rank {rank}; save the adapter again")
    alpha = float(by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank)))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Pair(a=a, b=np.float32(scale) * b)


def _aflora(module: str, parts: tuple[Floats, ...], config: Mapping[str, Any]) -> Pair:
    a, b, d_vector, b_vector = parts
    wanted = (a.shape[:1], b.shape[:1], a.shape[0])
    if (d_vector.shape, b_vector.shape, b.shape[-1]) != wanted:
        shapes = ", ".join(f"{n} {list(p.shape)}" for n, p in zip(AFLORA, parts, strict=True))
        raise AdapterError(f"{shapes} do not fit together; save the adapter again")
    alpha = by_pattern(config.get("alpha_pattern"), module, config.get("aflora_alpha"))
    scale = np.float32(1.0 if alpha is None else float(alpha) / a.shape[0])
    return Pair(a=d_vector[:, None] * a, b=(scale * b_vector)[:, None] * b)


Fold = Callable[[str, tuple[Floats, ...], Mapping[str, Any]], Pair]
KINDS: dict[str, tuple[tuple[str, ...], Fold]] = {
    "LORA": (LORA, _lora),
    "AFLORA": (AFLORA, _aflora),
}
