"""Shared fixtures: tiny checkpoints, fixed seeds, few threads, uninitialised memory that is NaN."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of huggingface_hub reads it
os.environ.setdefault("TQDM_DISABLE", "1")
# Deterministic algorithms, asked for below, warn at every product on CUDA without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch

from edgekit.testing import write_tiny_checkpoint

TinyCheckpoint = Callable[..., Path]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    # torch.empty and its relatives then return NaN, so a cell that nobody wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    missing = {
        "gpu": None if torch.cuda.is_available() else "there is no CUDA device",
        "interp": None if interpreted else "TRITON_INTERPRET is not 1",
    }
    for item in items:
        for name, reason in missing.items():
            if reason is not None and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what third-party code under test may draw from


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """A factory: `tiny_checkpoint("qwen3", tie_word_embeddings=False)` is a directory, made once.

    Treat it as read-only; copy it to damage it.
    """
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            directory = tmp_path_factory.mktemp(f"tiny-{family}")
            made[key] = write_tiny_checkpoint(directory, family, **options)
        return made[key]

    return make
