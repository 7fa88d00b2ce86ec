"""A tiny model, a few examples, and a tuning that takes seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.adapters.tune.recipe import Recipe, load_recipe

SMALL: dict[str, Any] = {"steps": 12, "batch": 4, "micro_batch": 2, "rank": 2, "lr": 2e-2}


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty prompts of unlike lengths, each with a word to learn."""
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    lines = [
        {"prompt": f"Is {'very ' * (i % 3)}{i} even:", "completion": (" yes", " no")[i % 2]}
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def small() -> Callable[..., Recipe]:
    """A shipped recipe made small; keys may be set, with `__` for a dot."""

    def make(method: str, **overrides: Any) -> Recipe:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        fast = {"freeze.interval": 2} if method == "aflora" else {}
        return load_recipe(method, {**SMALL, **fast, **dotted})

    return make
