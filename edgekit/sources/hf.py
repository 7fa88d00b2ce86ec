"""A directory in Hugging Face's layout: memory-mapped safetensors, and never a pickle."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgekit.errors import SourceError
from edgekit.models.weights import WeightStore
from edgekit.sources.base import Source, read_json, sha256_of
from edgekit.sources.checks import check_weights
from edgekit.sources.hf_config import parse_config
from edgekit.sources.vlm import (
    BIDIRECTIONAL,
    TextStore,
    is_vision_language,
    text_config,
    vision_source,
)

__all__ = ["OFFSET_NORMS", "OffsetNorms", "SafetensorsStore", "open_directory"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OFFSET_NORMS = ("gemma3_text",)  # families whose norms multiply by 1 + w
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class SafetensorsStore:
    """Tensors of one or several safetensors files, memory-mapped; one handle per file."""

    def __init__(self, files: Mapping[Path, frozenset[str] | None]) -> None:
        """Open every file, which checks its header against its size.

        Args:
            files: the names to take from each file; None for all it holds.

        Raises:
            SourceError: if a file is missing, damaged, or lacks a name.
        """
        self._handles: dict[str, Any] = {}
        for path, names in files.items():
            handle, held = _open(path)
            for name in held if names is None else names:
                if name not in held:
                    raise SourceError(f"{path}: has no tensor {name!r}, which the index promises")
                self._handles[name] = handle

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, in its stored dtype, over the mapped file."""
        if name not in self._handles:
            raise SourceError(f"the source has no tensor {name!r}; is the checkpoint complete?")
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        return tensor


class OffsetNorms:
    """A store whose norms hold w where they multiply by 1 + w, which it returns, in fp32."""

    def __init__(self, base: WeightStore) -> None:
        self._base = base

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`."""
        tensor = self._base.tensor(name)
        return 1.0 + tensor.float() if name.endswith("norm.weight") else tensor


def _open(path: Path) -> tuple[Any, frozenset[str]]:
    try:
        handle: Any = safe_open(path, framework="pt")
        return handle, frozenset(handle.keys())
    except FileNotFoundError as cause:
        raise SourceError(f"{path}: missing, though the index names it; fetch it again") from cause
    except (SafetensorError, OSError) as cause:
        raise SourceError(
            f"{path}: truncated, damaged or no safetensors file ({cause}); fetch it again"
        ) from cause


def open_directory(
    directory: Path,
    *,
    name: str | None = None,
    identity: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> Source:
    """Open a model directory and check every tensor against its configuration.

    Args:
        directory: config.json beside model.safetensors or its shards and index.
        name: the source's name; None: the directory's.
        identity: what `Source.identity` says instead of this directory; a missing sha256 is added.
        notes: put before the notes that the configuration gives rise to.

    Raises:
        SourceError: if something is missing, damaged or stored as a pickle.
        UnsupportedError: if the model is sound but not one edgekit expresses.
    """
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; give a model directory, file or Hub id")
    if not any(directory.iterdir()):
        raise SourceError(f"{directory}: empty; a model directory has config.json and {SINGLE}")
    foreign = read_json(directory / "config.json")
    files = _weight_files(directory)
    stored: WeightStore = SafetensorsStore(files)
    vision = vision_source(directory, foreign) if is_vision_language(foreign) else None
    if vision is None:
        config, config_notes = parse_config(foreign, _generation(directory))
    else:
        stored = text = TextStore(stored)
        config, config_notes = parse_config(text_config(foreign), _generation(directory))
        config = replace(config, tied_head=text.tied)
        if vision.family in BIDIRECTIONAL:
            config = replace(config, image_attention="bidirectional")
    check_weights(config, stored)
    if config.family in OFFSET_NORMS:
        stored = OffsetNorms(stored)
    name = name or directory.resolve().name
    identity = {"kind": "hf-directory", "name": name} if identity is None else dict(identity)
    if "sha256" not in identity:
        identity["sha256"] = sha256_of(sorted(files))
    return Source(
        name=name,
        directory=directory,
        config=config,
        weights=stored,
        identity=identity,
        notes=notes + config_notes,
        vision=vision,
    )


def _generation(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _weight_files(directory: Path) -> dict[Path, frozenset[str] | None]:
    """Each weight file, and the tensors to take from it."""
    if (directory / SINGLE).exists():
        return {directory / SINGLE: None}
    if (directory / INDEX).exists():
        return _shards(directory / INDEX)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise SourceError(
            f"{directory / pickles[0]}: a pickle can run code and is not opened; "
            "save the model again with save_pretrained, which writes safetensors"
        )
    raise SourceError(f"{directory}: has neither {SINGLE} nor {INDEX}; is the download complete?")


def _shards(index: Path) -> dict[Path, frozenset[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: has no weight_map; fetch it again")
    names: dict[Path, set[str]] = {}
    for tensor, shard in weight_map.items():
        # A bare file name only: the index comes from strangers and must not reach outside.
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise SourceError(f"{index}: names {shard!r}; allowed: a file name of this directory")
        if not shard.endswith(".safetensors"):
            raise SourceError(f"{index}: names {shard!r}; allowed: .safetensors files only")
        names.setdefault(index.parent / shard, set()).add(tensor)
    return {path: frozenset(names[path]) for path in sorted(names)}
