"""Low-rank differences as the LoRA adapter that every runtime reads.

The scale is in B, so alpha is the rank; ranks are made alike with zeros, since not every reader
knows rank patterns. Row j of A and column j of B are brought to the same norm, which changes
nothing but keeps both far from the ends of fp16.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgekit.runtime.adapter_file import CONFIG, PREFIX, TENSORS
from edgekit.runtime.engine import Floats
from edgekit.runtime.lowrank import Pair, balanced
from edgekit.staging import staged

__all__ = ["LoraDtype", "write_lora"]

LoraDtype = Literal["float32", "float16"]
LORA: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "inference_mode": True}
SHARED = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "auto_mapping")


def write_lora(
    out: str | Path,
    pairs: Mapping[str, Pair],
    config: Mapping[str, Any],
    *,
    rest: Mapping[str, Floats] | None = None,
    dtype: LoraDtype = "float32",
    force: bool = False,
) -> Path:
    """Write an adapter directory, whole or not at all.

    Args:
        out: a directory to make.
        pairs: by module, one or more.
        config: of the adapter that they come from; what says which model it is for is kept.
        rest: tensors that were trained whole, by name.
        dtype: of the pairs.
        force: replace an adapter that is there.

    Returns:
        `out`.

    Raises:
        BundleError: if `out` exists or cannot be written.
    """
    from safetensors.numpy import save_file

    rank = max(pair.rank for pair in pairs.values())
    tensors: dict[str, Any] = {f"{PREFIX}{name}": t for name, t in (rest or {}).items()}
    for module, pair in pairs.items():
        wide = _padded(balanced(pair), rank)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = wide.a.astype(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = wide.b.astype(dtype)
    settings = LORA | {key: config[key] for key in SHARED if config.get(key) is not None}
    settings |= {"r": rank, "lora_alpha": rank, "target_modules": sorted(pairs)}
    settings |= {"fan_in_fan_out": bool(config.get("fan_in_fan_out"))}
    final = Path(out)
    with staged(final, force=force, kind="adapter") as work:
        save_file(tensors, work / TENSORS, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True)
        (work / CONFIG).write_text(text + "\n", encoding="utf-8")
    return final


def _padded(pair: Pair, rank: int) -> Pair:
    extra = rank - pair.rank
    return Pair(a=np.pad(pair.a, ((0, extra), (0, 0))), b=np.pad(pair.b, ((0, 0), (0, extra))))
