"""A model with adapters merged into it, as a Hugging Face directory.

Merging rounds the difference, not only the sum: where the directory's dtype is narrow, a small
difference is lost. What is left of it is measured for every module.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from edgekit.errors import AdapterError
from edgekit.models.config import DecoderConfig
from edgekit.sources import Source, open_source
from edgekit.sources.adapted import AdaptedStore, LiNeS, adapted
from edgekit.sources.adapters import AdapterChoice
from edgekit.staging import staged

__all__ = ["MergeReport", "MergedModule", "merge_adapters"]

Dtype = Literal["float32", "float16", "bfloat16"]
Progress = Callable[[str, int, int], None]
SHARD_BYTES = 2 << 30  # of a file; no more than that is in memory
WARN_ABOVE = 0.1
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedModule:
    """What became of one module's difference D.

    Attributes:
        module: its path.
        ratio: rms(D) / rms(W).
        lost: |(cast(W + D) - W) - D| / |D|.
    """

    module: str
    ratio: float
    lost: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What `merge_adapters` did.

    Attributes:
        out: the directory.
        dtype: of its tensors.
        modules: one entry per adapted matrix.
        notes: what the user should know, one sentence each.
    """

    out: Path
    dtype: str
    modules: tuple[MergedModule, ...]
    notes: tuple[str, ...]


def merge_adapters(
    source: str | Path,
    out: str | Path,
    choices: Sequence[AdapterChoice],
    *,
    dtype: Dtype = "float32",
    lines: LiNeS | None = None,
    untie: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a model with adapters merged into it.

    Args:
        source: the model, as for `convert`.
        out: a directory to make, which transformers opens.
        choices: the adapters; none writes the model as it is.
        dtype: of its tensors; all differences are added up in fp32 and cast once.
        lines: factors by depth.
        untie: give the head a matrix of its own where an adapter changes it.
        force: replace a model that is there.
        progress: called with a step's name, its number and the count of steps.

    Raises:
        UsageError: for an adapter given twice.
        SourceError: if the model cannot be read.
        AdapterError: if an adapter cannot be read or does not fit.
        BundleError: if `out` exists or cannot be written.
    """
    opened = open_source(source)
    config, store = adapted(opened, choices, lines=lines, untie=untie)
    modules: list[MergedModule] = []
    with staged(out, force=force, kind="model") as work:
        _write_texts(opened, config, work, dtype)
        shards = list(_shards(store, getattr(torch, dtype).itemsize))
        for number, names in enumerate(shards):
            if progress is not None:
                progress("merge", number, len(shards))
            _write_shard(store, names, work, number, len(shards), dtype, modules)
        if len(shards) > 1:
            _write_index(store, shards, work, dtype)
    return MergeReport(
        out=Path(out), dtype=dtype, modules=tuple(modules), notes=_notes(opened, modules, dtype)
    )


def _notes(source: Source, modules: Sequence[MergedModule], dtype: str) -> tuple[str, ...]:
    lossy = [module for module in modules if module.lost > WARN_ABOVE]
    if not lossy:
        return source.notes
    worst = max(lossy, key=lambda module: module.lost)
    return (
        *source.notes,
        f"{dtype} loses {worst.lost:.0%} of the difference in {worst.module}, and more than "
        f"{WARN_ABOVE:.0%} in {len(lossy)} of {len(modules)} modules; use float32, or keep the "
        "adapter beside the weights (convert --adapter-mode side-path).",
    )


def _shards(store: AdaptedStore, itemsize: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in the model's order."""
    names: list[str] = []
    size, plain = 0, store.plain()
    for name in store:
        nbytes = plain.tensor(name).numel() * itemsize
        if names and size + nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _write_shard(
    store: AdaptedStore,
    names: list[str],
    work: Path,
    number: int,
    count: int,
    dtype: Dtype,
    modules: list[MergedModule],
) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name in names:
        merged = store.tensor(name)
        cast = merged.to(getattr(torch, dtype)).contiguous()
        if not cast.isfinite().all():
            raise AdapterError(f"{name}: a merged value is too large for {dtype}; use float32")
        module = name.removesuffix(".weight")
        if module in store.modules and name.endswith(".weight"):
            modules.append(_merged_module(store, module, cast))
        tensors[name] = cast
    save_file(tensors, work / _file(number, count), metadata={"format": "pt"})


def _merged_module(store: AdaptedStore, module: str, cast: torch.Tensor) -> MergedModule:
    weight = store.plain().tensor(f"{module}.weight").double()
    difference = store.difference(module).double()
    size = difference.norm()
    left = cast.double() - weight
    return MergedModule(
        module=module,
        ratio=float(size / weight.norm()),
        lost=float((left - difference).norm() / size) if size else 0.0,
    )


def _write_index(store: AdaptedStore, shards: list[list[str]], work: Path, dtype: Dtype) -> None:
    files = {n: _file(i, len(shards)) for i, names in enumerate(shards) for n in names}
    elements = sum(store.plain().tensor(name).numel() for name in store)
    total = elements * getattr(torch, dtype).itemsize
    index = {"metadata": {"total_size": total}, "weight_map": files}
    text = json.dumps(index, indent=2)
    (work / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _file(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_texts(source: Source, config: DecoderConfig, work: Path, dtype: Dtype) -> None:
    """Everything of the model's directory but its weights; its configuration says what changed."""
    for path in sorted(source.directory.iterdir()):
        if path.is_file() and not path.name.endswith(NOT_COPIED):
            shutil.copyfile(path, work / path.name)
    settings = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    settings |= {"tie_word_embeddings": config.tied_head, "dtype": dtype}
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (work / "config.json").write_text(text + "\n", encoding="utf-8")
