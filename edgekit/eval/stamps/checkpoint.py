"""What a training needs to go on exactly where it was: one file, replaced whole.

Batches and rates follow from the step, and nothing else is left to chance, so parameters and the
optimiser's moments are all there is.
"""

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgekit.errors import TrainingError

__all__ = ["Checkpoint", "forget", "latest", "write"]

FILE = "checkpoint.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One point of a training.

    Attributes:
        stage: its number.
        step: steps of it that are done.
        seconds: that all of it took so far.
        tensors: parameters by name.
        optimiser: its state; None at the beginning of a stage.
    """

    stage: int
    step: int
    seconds: float
    tensors: dict[str, torch.Tensor]
    optimiser: dict[str, Any] | None


def write(folder: Path, settings: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `folder` by a later one.

    Args:
        folder: of the run.
        settings: JSON-ready; what the run depends on.
        checkpoint: what is written.
    """
    content = {
        "settings": json.dumps(settings),
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "tensors": {name: t.detach() for name, t in checkpoint.tensors.items()},
        "optimiser": checkpoint.optimiser,
    }
    part = folder / f"{FILE}.part"
    with part.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / FILE)


def latest(folder: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint in `folder`; None if there is none.

    Raises:
        TrainingError: if it is damaged, or of a run with other settings.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = json.loads(content.pop("settings"))
        checkpoint = Checkpoint(**content)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
    ) as cause:
        raise TrainingError(f"{path}: damaged; remove it to begin again") from cause
    wanted = json.loads(json.dumps(settings))
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if keys:
        changes = "; ".join(f"{key}: {found.get(key)} there, {wanted.get(key)} now" for key in keys)
        raise TrainingError(f"{path}: of other settings ({changes}); give another folder")
    return checkpoint


def forget(folder: Path) -> None:
    """Remove the checkpoint."""
    (folder / FILE).unlink(missing_ok=True)
