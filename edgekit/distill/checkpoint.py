"""What a run needs to go on exactly where it was: one safetensors file per checkpoint.

Data order, rates and dropout are pure functions of the step, so parameters, AdamW's moments, what a
stage measured and the step are all there is.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edgekit.errors import TrainingError

__all__ = ["Checkpoint", "differing_keys", "forget", "latest", "write"]

PREFIX, SUFFIX = "checkpoint-", ".safetensors"
KEPT = 2
HEADER = "edgekit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One point of a run.

    Attributes:
        stage: its number.
        step: optimiser steps of the stage that are done.
        tokens: positions that the stage has read, padding not counted.
        seconds: that it took, all runs together.
        loss: of the last step.
        fingerprint: what must be the same for the run to go on: recipe, teacher, data, precision.
        history: a record of each stage that is over.
        tensors: `parameter.NAME`, `first.NAME` and `second.NAME` (AdamW's moments), `buffer.NAME`.
    """

    stage: int
    step: int
    tokens: int
    seconds: float
    loss: float
    fingerprint: dict[str, Any]
    history: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]


def write(folder: Path, number: int, checkpoint: Checkpoint) -> Path:
    """Write checkpoint `number` (rising over the whole run) whole, and drop the oldest.

    Raises:
        OSError: if the disk refuses; the earlier checkpoints stay.
    """
    header = {
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
        "seconds": checkpoint.seconds,
        "loss": checkpoint.loss,
        "fingerprint": checkpoint.fingerprint,
        "history": checkpoint.history,
    }
    path = folder / f"{PREFIX}{number:09d}{SUFFIX}"
    part = path.with_suffix(".part")
    tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
    with part.open("wb") as file:
        file.write(save(tensors, {HEADER: json.dumps(header)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    for old in _all(folder)[:-KEPT]:
        old.unlink()
    return path


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that can be read; None if there is none.

    Raises:
        TrainingError: if there are checkpoints and all are damaged.
    """
    found = _all(folder)
    for path in reversed(found):
        try:
            return _read(path)
        except (OSError, SafetensorError, ValueError, KeyError):
            continue
    if found:
        raise TrainingError(f"{folder}: no checkpoint can be read; start again with --force")
    return None


def forget(folder: Path) -> None:
    """Remove every checkpoint in `folder`."""
    for path in _all(folder):
        path.unlink()


def differing_keys(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with the old and the new one."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return found


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(tensors=tensors, **header)
