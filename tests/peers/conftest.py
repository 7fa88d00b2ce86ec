"""Bundles that other toolkits open, and what edgekit says to the same ids.

Everything is compared in fp32: edgekit asks OpenVINO for it, while the peers leave the precision to
the plug-in, which takes bf16 where the CPU has it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.export.pipeline import convert
from edgekit.runtime import GenerationOptions, Model, load
from edgekit.runtime.beam import beam_search
from edgekit.runtime.generation import left_padded

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "q_head": {"mixer": "lawcat"},
    "kv_head": {"mixer": "lawcat", "state_sharing": "kv_head"},
    "hybrid": {"mixer": "lawcat", "softmax_layers": (1,)},
}
REAL: dict[str, dict[str, Any]] = {
    "smollm2-softmax-int4": {"weights": "int4"},
    "smollm2-lawcat-int8": {"weights": "int8", "mixer": "lawcat"},
}
COUNT = 32
BEAM_COUNT = 24
Prompt = np.ndarray


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `kind` runs for each tiny bundle; `bundle_name` adds real ones."""
    real = [pytest.param(name, marks=pytest.mark.slow) for name in REAL]
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", list(KINDS))
    if "bundle_name" in metafunc.fixturenames:
        metafunc.parametrize("bundle_name", [*KINDS, *real])


@pytest.fixture(scope="session")
def bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`bundle("hybrid")` is a directory with both engines, made once; treat it as read-only."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("bundles") / name
            if name in KINDS:
                source: Path | str = tiny_checkpoint("llama")
                settings = {"weights": "fp32", **KINDS[name]}
            else:
                source, settings = "smollm2-135m-instruct", REAL[name]
            convert(source, out, verify=False, target="generic-x86", **settings)
            made[name] = out
        return made[name]

    return make


@pytest.fixture(scope="session")
def opened(bundle: Callable[[str], Path]) -> Callable[[str, str], Model]:
    """`opened("hybrid", "onnx")` is the bundle in edgekit's own runtime, loaded once."""
    made: dict[tuple[str, str], Model] = {}

    def make(name: str, engine: str) -> Model:
        key = (name, engine)
        if key not in made:
            made[key] = load(bundle(name), engine=engine)
        return made[key]

    return make


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Two prompts of different lengths, without a special token; every vocabulary has these ids."""
    random = np.random.default_rng(5)
    return [random.integers(3, 320, length) for length in (9, 21)]


@pytest.fixture(scope="session")
def prompt_of(
    opened: Callable[[str, str], Model], prompts: list[Prompt]
) -> Callable[[str], Prompt]:
    """`prompt_of("hybrid")`: the longer prompt; for a real bundle a request in its template."""

    def choose(name: str) -> Prompt:
        if name in KINDS:
            return prompts[1]
        model = opened(name, "onnx")
        text = model.chat_prompt([{"role": "user", "content": "Tell me a long story."}])
        return model.tokenizer.encode_prompt(text)

    return choose


@pytest.fixture(scope="session")
def greedy(opened: Callable[[str, str], Model]) -> Callable[..., list[list[int]]]:
    """`greedy("hybrid", "onnx", prompts)`: edgekit's 32 greedy tokens of each, not ended by any."""

    def run(name: str, engine: str, prompts: Sequence[Prompt], count: int = COUNT) -> Any:
        session = opened(name, engine).session(len(prompts))
        logits = session.append(*left_padded(prompts))
        written = [logits.argmax(axis=1)]
        while len(written) < count:
            logits = session.append(written[-1][:, None])
            written.append(logits.argmax(axis=1))
        return np.stack(written, axis=1).tolist()

    return run


@pytest.fixture(scope="session")
def beams(opened: Callable[[str, str], Model]) -> Callable[[str, str, Prompt], list[int]]:
    """`beams("hybrid", "onnx", prompt)`: edgekit's best of 3 beams, 24 tokens, not ended by any."""
    options = GenerationOptions(num_beams=3, max_new_tokens=BEAM_COUNT)

    def run(name: str, engine: str, prompt: Prompt) -> list[int]:
        return beam_search(opened(name, engine).session(), prompt, options, ()).tokens

    return run
