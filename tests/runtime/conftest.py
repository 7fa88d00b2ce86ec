"""Tiny bundles of every kind on both engines, and the torch decoder that they came from."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekit.adapters.aflora import AFLoraConfig
from edgekit.export.pipeline import convert
from edgekit.models.config import DecoderConfig, LawcatConfig
from edgekit.models.decoder import Decoder, with_fresh_mixers
from edgekit.models.weights import WeightStore
from edgekit.runtime import Model, load
from edgekit.sources import open_source

KINDS = {
    "softmax": {},
    "q_head": {"mixer": "lawcat"},
    "kv_head": {"mixer": "lawcat", "state_sharing": "kv_head"},
    "hybrid": {"mixer": "lawcat", "softmax_layers": (1,)},
}
ENGINES = ("openvino", "onnx")
LAYOUTS: dict[str, dict[str, Any]] = {**KINDS, "lolcats": {"mixer": "lolcats"}}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL),
    "aflora": lambda: AFLoraConfig(r=3, aflora_alpha=5.0, target_modules=["q_proj", "v_proj"]),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=ALL),
}
Loader = Callable[..., Model]
Reference = Callable[..., np.ndarray]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `kind` or `engine` runs for each."""
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", list(KINDS))
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", ENGINES)


@pytest.fixture(scope="session")
def bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`bundle("hybrid")` is a directory with both engines, made once; treat it as read-only."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            out = tmp_path_factory.mktemp("bundles") / kind
            source = tiny_checkpoint("llama")
            convert(source, out, weights="fp32", verify=False, target="generic-x86", **KINDS[kind])
            made[kind] = out
        return made[kind]

    return make


@pytest.fixture(scope="session")
def opened(bundle: Callable[[str], Path]) -> Loader:
    """`opened("hybrid", "onnx", logits="all")` is a loaded model, made once."""
    made: dict[tuple[str, str, str], Model] = {}

    def make(kind: str, engine: str, logits: str = "last") -> Model:
        key = (kind, engine, logits)
        if key not in made:
            made[key] = load(bundle(kind), engine=engine, logits=logits)
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Reference]:
    """`reference("hybrid")(ids, mask)` are the torch decoder's logits `[B, T, V]`."""
    made: dict[str, Decoder] = {}

    def make(kind: str) -> Reference:
        if kind not in made:
            config, weights = _student(tiny_checkpoint("llama"), kind)
            made[kind] = Decoder.from_store(config, weights)
        return functools.partial(_torch_logits, made[kind])

    return make


def _student(checkpoint: Path, kind: str) -> tuple[DecoderConfig, WeightStore]:
    source = open_source(checkpoint)
    settings = KINDS[kind]
    kept = settings.get("softmax_layers", ())
    mixers = tuple(
        "softmax" if i in kept else settings.get("mixer", "softmax")
        for i in range(source.config.num_layers)
    )
    lawcat = LawcatConfig(state_sharing=settings.get("state_sharing", "q_head"))
    config = source.config.with_mixers(mixers, lawcat)
    return config, with_fresh_mixers(config, source.weights)


@pytest.fixture(scope="session")
def ids() -> np.ndarray:
    """150 token ids: longer than a prefill block of either engine's recurrent chunks."""
    return np.random.default_rng(7).integers(3, 320, 150)


def _torch_logits(decoder: Decoder, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.inference_mode():
        given = None if mask is None else torch.from_numpy(mask)
        return decoder(torch.from_numpy(ids), mask=given)[0].numpy()


@pytest.fixture(scope="session")
def adapter(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`adapter("lora", "qwen2")` is a directory that PEFT wrote, made once; read-only."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, family: str = "llama") -> Path:
        if (kind, family) not in made:
            model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
            random = torch.Generator().manual_seed(len(kind))
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                model = peft.get_peft_model(model, ADAPTERS[kind]())
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.15 * torch.randn(parameter.shape, generator=random))
                made[kind, family] = tmp_path_factory.mktemp(family) / kind
                model.save_pretrained(made[kind, family])
        return made[kind, family]

    return make


@pytest.fixture(scope="session")
def fresh(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """`fresh("hybrid", "onnx", adapter_slots="all")` is a new model of a bundle made once."""
    made: dict[str, Path] = {}

    def make(
        layout: str,
        engine: str,
        *,
        weights: str = "fp32",
        family: str = "llama",
        logits: Any = "last",
        graph: str | None = None,
        **settings: Any,
    ) -> Model:
        key = f"{layout} {weights} {family} {sorted(settings.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / "bundle"
            options = {"weights": weights, "verify": False, "target": "generic-x86"}
            convert(tiny_checkpoint(family), made[key], **options, **LAYOUTS[layout], **settings)
        return load(made[key], engine=engine, logits=logits, graph=graph, check=False)

    return make
