"""Bundles with adapter slots in other runtimes: the base, or the adapter by their own means."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekit.export.onnx_adapter import write_onnx_adapter
from edgekit.export.pipeline import convert
from edgekit.runtime import load

pytestmark = pytest.mark.peer

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "kv_head": {"mixer": "lawcat", "state_sharing": "kv_head"},
    "hybrid": {"mixer": "lawcat", "softmax_layers": (1,)},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
COUNT = 32


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the tiny Llama that says something, with a scale of its own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=random))
    out = tmp_path_factory.mktemp("adapter") / "lora"
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module", params=KINDS)
def slotted(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("slots") / str(request.param)
    options = {"weights": "fp32", "verify": False, "adapter_slots": "all"}
    convert(tiny_checkpoint("llama"), out, **options, **KINDS[request.param])
    return out


def ours(bundle: Path, engine: str, prompt: np.ndarray, adapter: Path | None) -> list[int]:
    model = load(bundle, engine=engine)
    if adapter is not None:
        model.set_adapters({model.load_adapter(adapter): 1.0})
    session = model.session()
    written = [int(session.append(prompt)[0].argmax())]
    while len(written) < COUNT:
        written.append(int(session.append(np.array(written[-1:]))[0].argmax()))
    return written


@pytest.mark.parametrize("backend", [{}, {"ATTENTION_BACKEND": "SDPA"}], ids=["default", "SDPA"])
def test_openvino_genai_sees_the_base(
    backend: dict[str, str], slotted: Path, prompts: list[np.ndarray]
) -> None:
    import openvino as ov

    genai = importlib.import_module("openvino_genai")
    pipe = genai.LLMPipeline(str(slotted), "CPU", **backend, **F32)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = COUNT, True
    prompt = prompts[1]
    ids, mask = prompt[None], np.ones_like(prompt[None])
    inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(mask))
    expected = ours(slotted, "openvino", prompt, None)
    for _ in range(2):
        assert pipe.generate(inputs, config).tokens == [expected]


def test_openvino_genai_refuses_its_own_adapters_on_slots(slotted: Path, adapter: Path) -> None:
    """Two side paths on one product do not compile; on a bundle without slots they work."""
    genai = importlib.import_module("openvino_genai")
    lora = genai.Adapter(str(adapter / "adapter_model.safetensors"))
    with pytest.raises(RuntimeError, match="shape_b"):
        genai.LLMPipeline(str(slotted), "CPU", adapters=genai.AdapterConfig(lora), **F32)


@pytest.mark.parametrize("active", [False, True], ids=["base", "adapter"])
def test_onnxruntime_genai_takes_our_adapter_file(
    active: bool, slotted: Path, adapter: Path, prompts: list[np.ndarray], tmp_path: Path
) -> None:
    genai = importlib.import_module("onnxruntime_genai")
    prompt, path = prompts[1], tmp_path / "lora.onnx_adapter"
    write_onnx_adapter(slotted, adapter, path)
    model = genai.Model(str(slotted))
    adapters = genai.Adapters(model)
    adapters.load(str(path), "lora")
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + COUNT, min_length=len(prompt) + COUNT)
    generator = genai.Generator(model, params)
    if active:
        generator.set_active_adapter(adapters, "lora")
    generator.append_tokens(prompt.astype(np.int32))
    for _ in range(COUNT):
        generator.generate_next_token()
    written = [int(token) for token in generator.get_sequence(0)[-COUNT:]]
    assert written == ours(slotted, "onnx", prompt, adapter if active else None)
