"""Adapters in other runtimes: GenAI with a folded adapter says what our merged bundle says."""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekit.adapters.aflora import AFLoraConfig, fold_to_lora
from edgekit.export.pipeline import convert
from edgekit.runtime import load

pytestmark = pytest.mark.peer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
COUNT = 32


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AFLoRA adapter of the tiny Llama that says something, with a scale of its own."""
    torch.manual_seed(3)  # this runs before `seeded`, and PEFT draws the projections
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AFLoraConfig(r=4, aflora_alpha=8.0, target_modules=TARGETS)
        model = peft.get_peft_model(model, config)
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "aflora_b" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        out = tmp_path_factory.mktemp("adapter") / "aflora"
        model.save_pretrained(out)
    return out


def greedy(bundle: Path, ids: np.ndarray) -> list[int]:
    session = load(bundle, engine="openvino").session()
    token = session.append(ids[None]).argmax(axis=1)
    written = [int(token[0])]
    while len(written) < COUNT:
        token = session.append(token[:, None]).argmax(axis=1)
        written.append(int(token[0]))
    return written


@pytest.mark.parametrize("settings", [{}, {"mixer": "lawcat"}], ids=["softmax", "lawcat"])
def test_genai_with_the_folded_adapter_writes_what_the_merged_bundle_writes(
    settings: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    adapter: Path,
    prompts: list[np.ndarray],
    tmp_path: Path,
) -> None:
    genai = importlib.import_module("openvino_genai")
    options = {"weights": "fp32", "formats": ["openvino"], "verify": False, **settings}
    convert(tiny_checkpoint("llama"), tmp_path / "base", **options)
    convert(tiny_checkpoint("llama"), tmp_path / "merged", adapters=[adapter], **options)
    folded = fold_to_lora(adapter, tmp_path / "lora") / "adapter_model.safetensors"
    expected = greedy(tmp_path / "merged", prompts[1])
    assert expected != greedy(tmp_path / "base", prompts[1])

    import openvino as ov

    config = genai.AdapterConfig(genai.Adapter(str(folded)), 1.0)
    pipe = genai.LLMPipeline(str(tmp_path / "base"), "CPU", adapters=config, **F32)
    generation = genai.GenerationConfig()
    generation.max_new_tokens, generation.ignore_eos, generation.adapters = COUNT, True, config
    ids = prompts[1][None]
    inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    assert list(pipe.generate(inputs, generation).tokens[0]) == expected
