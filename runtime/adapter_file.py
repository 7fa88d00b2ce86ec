"""What PEFT's `save_pretrained` wrote, read without PEFT and without torch.

A directory of `adapter_config.json` and `adapter_model.safetensors`. Pickles are never read.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors

from edgekit.errors import AdapterError
from edgekit.runtime.engine import Floats

__all__ = ["CONFIG", "PREFIX", "TENSORS", "AdapterFile", "by_pattern", "read_adapter"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFile:
    """An adapter as it lies on disk.

    Attributes:
        directory: where it was read.
        kind: PEFT's type, such as `LORA`.
        config: the JSON of `adapter_config.json`.
        tensors: fp32, by name in the model that was adapted (`model.layers.0….lora_A.weight`).
        metadata: of the safetensors file.
        sha256: of the safetensors file.
    """

    directory: Path
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Floats]
    metadata: Mapping[str, str]
    sha256: str


def read_adapter(directory: Path | str) -> AdapterFile:
    """Read an adapter's two files.

    Raises:
        AdapterError: if one is missing or damaged, or a value is not finite.
    """
    folder = Path(directory)
    config = _config(folder / CONFIG)
    path = folder / TENSORS
    if not path.is_file():
        pickled = [name for name in PICKLES if (folder / name).is_file()]
        raise AdapterError(
            f"{folder}: {pickled[0]} is a pickle, and pickled weights are not read; save it again "
            "with safetensors"
            if pickled
            else f"{folder}: {TENSORS} is missing; give what PEFT's save_pretrained wrote"
        )
    data = path.read_bytes()
    try:
        stored = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        metadata = _metadata(data)
    except (safetensors.SafetensorError, ValueError) as cause:
        raise AdapterError(f"{path}: damaged ({cause}); fetch the adapter again") from cause
    return AdapterFile(
        directory=folder,
        kind=str(config.get("peft_type")),
        config=config,
        tensors={_plain(name): _floats(path, name, info) for name, info in stored},
        metadata=metadata,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def by_pattern(patterns: Mapping[str, T] | None, module: str, default: T) -> T:
    """The value whose key, a module's name or a pattern of its end, fits, as PEFT has it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise AdapterError(f"{path}: cannot be read as JSON ({cause}); give an adapter") from cause
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{path}: names no peft_type; give what PEFT's save_pretrained wrote")
    return config


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header.get("__metadata__", {}))


def _floats(path: Path, name: str, info: Mapping[str, Any]) -> Floats:
    """A stored tensor in fp32; bf16, which numpy lacks, is the upper half of it."""
    kind, shape = info["dtype"], info["shape"]
    if kind == "BF16":
        halves = np.frombuffer(info["data"], dtype="<u2").astype(np.uint32)
        array: Floats = (halves << 16).view(np.float32)
    elif kind in FLOATS:
        with np.errstate(over="ignore"):
            array = np.frombuffer(info["data"], dtype=FLOATS[kind]).astype(np.float32)
    else:
        raise AdapterError(f"{path}: {name} is {kind}; allowed: BF16, {', '.join(FLOATS)}")
    if not np.isfinite(array).all():
        module, _, part = _plain(name).removesuffix(".weight").rpartition(".")
        raise AdapterError(
            f"{path}: {module}: {part} has values that are not finite; train it again"
        )
    return array.reshape(shape)
