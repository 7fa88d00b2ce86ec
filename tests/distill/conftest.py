"""A tiny teacher, a little text, and a distillation that takes seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekit.distill.build import student_config, student_over
from edgekit.distill.recipe import Recipe, load_recipe
from edgekit.models.decoder import Decoder
from edgekit.sources import open_source
from edgekit.testing import SENTENCES

TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def teacher_directory(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    paragraphs = [" ".join(SENTENCES[(i + j) % 3] for j in range(i % 4 + 1)) for i in range(60)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


# Short rows, and no needles, which the tiny tokenizer makes long.
SMALL: dict[str, Any] = {
    f"{stage}.{key}": value
    for stage in ("transfer", "tuning")
    for key, value in (("tokens", 512), ("length", 64), ("needles.share", 0.0))
}
SMALL["lolcats.window"] = 8  # shorter than the rows, so that something leaves it


@pytest.fixture(scope="session")
def smoke() -> Callable[..., Recipe]:
    """The smoke recipe, made small; keys may be set."""

    def make(**overrides: Any) -> Recipe:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return load_recipe("smoke", SMALL | dotted)

    return make


@pytest.fixture(scope="session")
def small() -> list[str]:
    """The same as flags of the command line."""
    return ["--recipe", "smoke", *(f"--set={key}={value}" for key, value in SMALL.items())]


@pytest.fixture
def pair(teacher_directory: Path, smoke: Callable[..., Recipe]) -> Callable[..., Any]:
    """A teacher and a fresh student that shares its tensors."""

    def make(**overrides: Any) -> tuple[Decoder, Decoder]:
        source = open_source(teacher_directory)
        teacher = Decoder.from_store(source.config, source.weights).requires_grad_(False)
        return teacher, student_over(teacher, student_config(source.config, smoke(**overrides)))

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(5))
