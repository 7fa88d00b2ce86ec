"""AFLoRA as plain LoRA, exactly: every runtime that reads LoRA reads it.

    lora_A = diag(d) A,   lora_B = s diag(b) B,   lora_alpha = r

so that the scale of the result is 1. Row j of A and column j of B are brought to the same norm,
which changes nothing but keeps both far from the ends of fp16.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgekit.bundle import staged
from edgekit.errors import AdapterError
from edgekit.runtime.adapter_file import CONFIG, PREFIX, TENSORS, AdapterFile, read_adapter
from edgekit.runtime.engine import Floats
from edgekit.runtime.lowrank import KINDS, Pair, balanced, grouped, low_rank_pairs

__all__ = ["fold_to_lora"]

KIND = "AFLORA"
LORA: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "inference_mode": True}
SHARED = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "auto_mapping")


def fold_to_lora(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    force: bool = False,
) -> Path:
    """Write the AFLoRA adapter in a directory as a LoRA adapter in another.

    Ranks become alike, since not every reader knows rank patterns: smaller ones get zeros.

    Args:
        source: what `save_pretrained` wrote.
        destination: a directory to make.
        dtype: of its tensors.
        force: replace what is there.

    Returns:
        `destination`.

    Raises:
        AdapterError: if `source` is no sound AFLoRA adapter.
        BundleError: if `destination` exists or cannot be written.
    """
    from safetensors.numpy import save_file

    file = read_adapter(source)
    if file.kind != KIND:
        raise AdapterError(f"{source}: peft_type {file.kind!r} given; allowed: {KIND!r}")
    pairs, rest = _pairs_and_rest(file)
    rank = max(pair.rank for pair in pairs.values())
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in rest.items()}
    for module, pair in pairs.items():
        wide = _padded(balanced(pair), rank)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = wide.a.astype(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = wide.b.astype(dtype)
    settings = LORA | {k: file.config[k] for k in SHARED if file.config.get(k) is not None}
    settings |= {"r": rank, "lora_alpha": rank, "target_modules": sorted(pairs)}
    settings |= {"fan_in_fan_out": bool(file.config.get("fan_in_fan_out"))}
    final = Path(destination)
    with staged(final, force=force, kind="adapter") as work:
        save_file(tensors, work / TENSORS, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True)
        (work / CONFIG).write_text(text + "\n", encoding="utf-8")
    return final


def _pairs_and_rest(file: AdapterFile) -> tuple[dict[str, Pair], Mapping[str, Floats]]:
    """The differences, and what was trained whole beside them, such as a classifier."""
    _, names = grouped(file.tensors, KINDS[KIND][0])
    rest = {name: file.tensors[name] for name in names}
    kept = {name: tensor for name, tensor in file.tensors.items() if name not in rest}
    return low_rank_pairs(replace(file, tensors=kept)), rest


def _padded(pair: Pair, rank: int) -> Pair:
    extra = rank - pair.rank
    return Pair(a=np.pad(pair.a, ((0, extra), (0, 0))), b=np.pad(pair.b, ((0, 0), (0, extra))))
