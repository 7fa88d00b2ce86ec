"""AFLoRA as plain LoRA, exactly: every runtime that reads LoRA reads it.

    lora_A = diag(d) A,   lora_B = s diag(b) B,   lora_alpha = r

so that the scale of the result is 1. Row j of A and column j of B are brought to the same norm,
which changes nothing but keeps both far from the ends of fp16.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from edgekit.adapters.aflora.config import by_pattern
from edgekit.bundle import staged
from edgekit.errors import UsageError

__all__ = ["balanced", "fold_to_lora", "folded_tensors"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = ("aflora_A", "aflora_B", "aflora_d", "aflora_b")
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
        UsageError: if `source` is no sound AFLoRA adapter.
    """
    from safetensors.torch import load_file, save_file

    config = _config(Path(source))
    file = Path(source) / TENSORS
    if not file.is_file():
        raise UsageError(f"{source}: {TENSORS} is missing; pickled weights are not read")
    pairs, rest = folded_tensors(load_file(file), config)
    rank = max(a.shape[0] for a, _ in pairs.values())
    tensors = dict(rest)
    for module, pair in pairs.items():
        a, b = (tensor.to(getattr(torch, dtype)).contiguous() for tensor in _padded(*pair, rank))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b
    settings = LORA | {key: config[key] for key in SHARED if config.get(key) is not None}
    settings |= {"r": rank, "lora_alpha": rank, "target_modules": sorted(pairs)}
    settings |= {"fan_in_fan_out": bool(config.get("fan_in_fan_out"))}
    final = Path(destination)
    with staged(final, force=force, kind="adapter") as work:
        save_file(tensors, work / TENSORS, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True)
        (work / CONFIG).write_text(text + "\n", encoding="utf-8")
    return final


def folded_tensors(
    tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """A `[r, in]` and B `[out, r]` of each module in fp32, and the tensors of another kind.

    Args:
        tensors: of the adapter's file.
        config: of the adapter's file.

    Raises:
        UsageError: if a module lacks a tensor, or one has another shape or is not finite.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in PARTS:
            parts.setdefault(module.removeprefix(PREFIX), {})[part] = tensor.float()
        else:
            rest[name] = tensor
    if not parts:
        raise UsageError("no AFLoRA tensors in this adapter; allowed: what AFLoRA saved")
    return {name: _folded(name, found, config) for name, found in sorted(parts.items())}, rest


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same B A with row j of A and column j of B of one norm; pairs with a zero stay."""
    down, up = a.norm(dim=1), b.norm(dim=0)
    usable = (down > 0) & (up > 0)
    factor = torch.where(usable, (up / down.clamp_min(1e-38)).sqrt(), torch.ones_like(down))
    return a * factor[:, None], b / factor


def _folded(
    module: str, parts: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    missing = [part for part in PARTS if part not in parts]
    if missing:
        raise UsageError(f"{module}: {missing[0]} is missing; save the adapter again")
    a, b, d_vector, b_vector = (parts[part] for part in PARTS)
    wanted = ((a.shape[0],), (b.shape[0],), a.shape[0])
    if (tuple(d_vector.shape), tuple(b_vector.shape), b.shape[1]) != wanted:
        shapes = ", ".join(f"{part} {list(parts[part].shape)}" for part in PARTS)
        raise UsageError(f"{module}: {shapes} do not fit together; save the adapter again")
    broken = [part for part in PARTS if not parts[part].isfinite().all()]
    if broken:
        raise UsageError(f"{module}: {broken[0]} has values that are not finite; train it again")
    scale = _scale(module, a.shape[0], config)
    return balanced(d_vector[:, None] * a, (scale * b_vector)[:, None] * b)


def _scale(module: str, rank: int, config: dict[str, Any]) -> float:
    alpha = by_pattern(config.get("alpha_pattern") or {}, module, config.get("aflora_alpha"))
    return 1.0 if alpha is None else float(alpha) / rank


def _padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    extra = rank - a.shape[0]
    pad = torch.nn.functional.pad
    return pad(a, (0, 0, 0, extra)), pad(b, (0, extra))


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise UsageError(f"{path}: cannot be read as JSON ({cause}); give an adapter") from cause
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "AFLORA":
        raise UsageError(f"{path}: peft_type {kind!r} given; allowed: 'AFLORA'")
    return dict(config)
