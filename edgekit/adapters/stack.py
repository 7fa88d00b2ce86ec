"""Several low-rank adapters as one: their exact weighted sum, ranks side by side.

Averaging factors instead is no sum of differences: (B1 + B2) (A1 + A2) is not B1 A1 + B2 A2.
"""

from collections.abc import Sequence
from pathlib import Path

from edgekit.adapters.lora_file import LoraDtype, write_lora
from edgekit.errors import AdapterError, UsageError
from edgekit.runtime.adapter_file import read_adapter
from edgekit.runtime.lowrank import Pair, joined, low_rank_pairs
from edgekit.sources.adapters import AdapterChoice

__all__ = ["stack_adapters"]


def stack_adapters(
    choices: Sequence[AdapterChoice],
    out: str | Path,
    *,
    dtype: LoraDtype = "float32",
    force: bool = False,
) -> Path:
    """Write several adapters as one LoRA adapter; its rank is the sum of theirs.

    Args:
        choices: LoRA or AFLoRA adapters of one model, one or more.
        out: a directory to make.
        dtype: of its tensors.
        force: replace an adapter that is there.

    Returns:
        `out`.

    Raises:
        UsageError: if none is given.
        AdapterError: if one is no low-rank difference, or two do not fit the same weight.
        BundleError: if `out` exists or cannot be written.
    """
    if not choices:
        raise UsageError("no adapter given; give one or more as PATH or PATH:WEIGHT")
    files = [read_adapter(choice.path) for choice in choices]
    parts: dict[str, list[tuple[float, Pair]]] = {}
    for choice, file in zip(choices, files, strict=True):
        for module, pair in low_rank_pairs(file).items():
            known = parts.setdefault(module, [])
            if known and known[0][1].shape != pair.shape:
                raise AdapterError(
                    f"{choice.path}: {module} is {list(pair.shape)}, another adapter has "
                    f"{list(known[0][1].shape)}; give adapters of one model"
                )
            known.append((choice.weight, pair))
    pairs = {module: joined(found) for module, found in sorted(parts.items())}
    return write_lora(out, pairs, files[0].config, dtype=dtype, force=force)
