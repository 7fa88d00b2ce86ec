"""Vector packs: d and b of an AFLoRA adapter (arXiv 2403.13269) without its projections A and B.

When the projections A and B are frozen, one more user or task is Σ(out + r) numbers. A pack names
the projections that it belongs to by their hash, and means nothing over others.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgekit.errors import AdapterError, UsageError
from edgekit.runtime.adapter_file import AdapterFile
from edgekit.runtime.engine import Floats

__all__ = ["FORMAT", "VectorPack", "apply_pack", "projections_sha256", "read_pack", "write_pack"]

FORMAT = "edgekit-vectors-1"
KIND = "AFLORA"
VECTORS, PROJECTIONS = (".aflora_d", ".aflora_b"), (".aflora_A", ".aflora_B")
SCALE = ("aflora_alpha", "alpha_pattern")  # of the adapter's configuration


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorPack:
    """A pack as it lies on disk.

    Attributes:
        path: where it was read.
        projections_sha256: of the A and B that it belongs to.
        scale: `aflora_alpha` and `alpha_pattern` of the adapter's configuration.
        tensors: `{module}.aflora_d [r]` and `{module}.aflora_b [out]`, fp32.
    """

    path: Path
    projections_sha256: str
    scale: Mapping[str, Any]
    tensors: Mapping[str, Floats]


def projections_sha256(file: AdapterFile) -> str:
    """A hash over names, shapes and fp32 values of an AFLoRA adapter's A and B.

    Raises:
        AdapterError: if it is no AFLoRA adapter.
    """
    if file.kind != KIND:
        raise AdapterError(
            f"{file.directory}: peft_type {file.kind!r} given; vector packs are for {KIND} alone"
        )
    digest = hashlib.sha256()
    for name in sorted(file.tensors):
        plain = name.removesuffix(".weight")
        if plain.endswith(PROJECTIONS):
            tensor = np.ascontiguousarray(file.tensors[name], dtype="<f4")
            digest.update(f"{plain} {list(tensor.shape)}\n".encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def write_pack(file: AdapterFile, path: Path | str, *, half: bool = False) -> None:
    """Write the vectors of an AFLoRA adapter.

    Args:
        file: the adapter.
        path: of the pack, usually `NAME.safetensors`.
        half: store them as fp16.

    Raises:
        AdapterError: if it is no AFLoRA adapter, or fp16 cannot hold a value.
        UsageError: if the file cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "projections_sha256": projections_sha256(file),
        "scale": json.dumps({name: file.config.get(name) for name in SCALE}, sort_keys=True),
    }
    tensors = {}
    with np.errstate(over="ignore"):
        for name, tensor in file.tensors.items():
            plain = name.removesuffix(".weight")
            if plain.endswith(VECTORS):
                tensors[plain] = tensor.astype(np.float16 if half else np.float32)
    for name, vector in tensors.items():
        if not np.isfinite(vector).all():
            raise AdapterError(f"{file.directory}: {name} is beyond fp16; write the pack in fp32")
    try:
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as cause:
        raise UsageError(f"{path}: cannot be written ({cause})") from cause


def read_pack(path: Path | str) -> VectorPack:
    """Read what `write_pack` wrote.

    Raises:
        AdapterError: if it is missing, damaged, no vector pack, or a value is not finite.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {n: file.get_tensor(n).astype(np.float32) for n in file.keys()}  # noqa: SIM118
        scale = json.loads(metadata.get("scale", "{}"))
    except (OSError, SafetensorError, TypeError, ValueError) as cause:
        raise AdapterError(f"{path}: no vector pack, or damaged ({cause})") from cause
    if metadata.get("format") != FORMAT or not isinstance(scale, dict):
        raise AdapterError(f"{path}: not a vector pack of this edgekit ({FORMAT})")
    for name, tensor in tensors.items():
        if not name.endswith(VECTORS):
            raise AdapterError(f"{path}: {name} is no vector of a pack; write it again")
        if not np.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} has values that are not finite; train it again")
    return VectorPack(
        path=Path(path),
        projections_sha256=metadata.get("projections_sha256", ""),
        scale=scale,
        tensors=tensors,
    )


def apply_pack(pack: VectorPack, file: AdapterFile) -> AdapterFile:
    """The adapter with the pack's vectors and scale in place of its own.

    Raises:
        AdapterError: if the pack belongs to other projections, or lacks a module's vector.
    """
    if projections_sha256(file) != pack.projections_sha256:
        raise AdapterError(
            f"{pack.path}: belongs to other projections than those of {file.directory}; give the "
            "adapter that it was trained over"
        )
    tensors = dict(file.tensors)
    for name in file.tensors:
        plain = name.removesuffix(".weight")
        if not plain.endswith(VECTORS):
            continue
        if plain not in pack.tensors:
            raise AdapterError(f"{pack.path}: {plain} is missing; write the pack again")
        tensors[name] = pack.tensors[plain]
    return replace(file, tensors=tensors, config={**file.config, **pack.scale})
