"""AFLoRA as plain LoRA, exactly: every runtime that reads LoRA reads it.

lora_A = diag(d) A,   lora_B = s diag(b) B,   lora_alpha = r
"""

from dataclasses import replace
from pathlib import Path

from edgekit.adapters.lora_file import LoraDtype, write_lora
from edgekit.errors import AdapterError
from edgekit.runtime.adapter_file import read_adapter
from edgekit.runtime.lowrank import KINDS, grouped, low_rank_pairs

__all__ = ["fold_to_lora"]

KIND = "AFLORA"


def fold_to_lora(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: LoraDtype = "float32",
    force: bool = False,
) -> Path:
    """Write the AFLoRA adapter in a directory as a LoRA adapter in another.

    Args:
        source: what `save_pretrained` wrote; what was trained whole beside the adapter, such as a
            classifier, is carried over.
        destination: a directory to make.
        dtype: of its tensors.
        force: replace what is there.

    Returns:
        `destination`.

    Raises:
        AdapterError: if `source` is no sound AFLoRA adapter.
        BundleError: if `destination` exists or cannot be written.
    """
    file = read_adapter(source)
    if file.kind != KIND:
        raise AdapterError(f"{source}: peft_type {file.kind!r} given; allowed: {KIND!r}")
    _, whole = grouped(file.tensors, KINDS[KIND][0])
    rest = {name: file.tensors[name] for name in whole}
    kept = {name: tensor for name, tensor in file.tensors.items() if name not in rest}
    pairs = low_rank_pairs(replace(file, tensors=kept))
    return write_lora(destination, pairs, file.config, rest=rest, dtype=dtype, force=force)
