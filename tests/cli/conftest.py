import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgekit.cli.main import main
from edgekit.export.pipeline import convert


@dataclass(frozen=True, kw_only=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Edgekit = Callable[..., Done]


@pytest.fixture
def edgekit(capsys: pytest.CaptureFixture[str]) -> Edgekit:
    """`edgekit("inspect", bundle)` runs the command in this process."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Done(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax bundle for both engines; read-only."""
    out = tmp_path_factory.mktemp("cli") / "bundle"
    convert(checkpoint, out, weights="fp32", verify=False)
    return out


@pytest.fixture(scope="session")
def lawcat_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "lawcat"
    convert(checkpoint, out, mixer="lawcat", weights="fp32", verify=False)
    return out
