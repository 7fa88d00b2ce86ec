"""`openvino_genai.LLMPipeline` on our bundles."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.runtime.generation import left_padded

pytestmark = pytest.mark.peer

F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
BACKENDS = {"default": {}, "SDPA": {"ATTENTION_BACKEND": "SDPA"}}
NEAR_TIE = 0.2  # of logits that range over 40
TEXTS = ["The river  naïve 日本 12", "Once upon"]
Pipeline = Callable[..., Any]
# What its paged backend says of a graph that is not all softmax attention.
NOT_PAGED = {
    "q_head": "No ScaledDotProductAttention operation observed",
    "kv_head": "No ScaledDotProductAttention operation observed",
    "hybrid": "Model references undeclared parameters",
}


@pytest.fixture(scope="module")
def genai() -> Any:
    return importlib.import_module("openvino_genai")


@pytest.fixture(scope="module")
def pipeline(genai: Any, bundle: Callable[[str], Path]) -> Pipeline:
    made: dict[tuple[str, str], Any] = {}

    def make(name: str, backend: str = "default") -> Any:
        key = (name, backend)
        if key not in made:
            settings = F32 | BACKENDS[backend]
            made[key] = genai.LLMPipeline(str(bundle(name)), "CPU", **settings)
        return made[key]

    return make


def tokens_of(genai: Any, pipe: Any, prompts: list[np.ndarray], **settings: Any) -> Any:
    """What the pipeline writes after ids, padded on the left."""
    import openvino as ov

    ids, mask = left_padded(prompts)
    return pipe.generate(
        genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(mask)), configured(genai, **settings)
    ).tokens


def configured(genai: Any, **settings: Any) -> Any:
    config = genai.GenerationConfig()
    for name, value in {"max_new_tokens": 32, "ignore_eos": True, **settings}.items():
        setattr(config, name, value)
    return config


def test_greedy_tokens_are_ours_and_state_is_reset(
    bundle_name: str, genai: Any, pipeline: Pipeline, greedy: Any, prompt_of: Any
) -> None:
    prompt = prompt_of(bundle_name)
    expected = greedy(bundle_name, "openvino", [prompt])
    pipe = pipeline(bundle_name, "SDPA")
    assert tokens_of(genai, pipe, [prompt]) == expected
    assert tokens_of(genai, pipe, [prompt]) == expected


def test_default_backend_parts_from_us_at_a_near_tie_if_at_all(
    bundle_name: str, genai: Any, pipeline: Pipeline, greedy: Any, opened: Any, prompt_of: Any
) -> None:
    """Paged attention rounds otherwise, which int4 and its 8-bit activations make visible."""
    prompt = prompt_of(bundle_name)
    (expected,) = greedy(bundle_name, "openvino", [prompt])
    (found,) = tokens_of(genai, pipeline(bundle_name), [prompt])
    parting = next((i for i in range(32) if found[i] != expected[i]), None)
    if parting is None:
        return
    assert bundle_name == "smollm2-softmax-int4"
    so_far = np.concatenate((prompt, expected[:parting])).astype(np.int64)
    logits = opened(bundle_name, "openvino").session().append(so_far)[0]
    assert logits.max() - logits[found[parting]] < NEAR_TIE


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_with_left_padding(
    kind: str, backend: str, genai: Any, pipeline: Pipeline, greedy: Any, prompts: Any
) -> None:
    expected = greedy(kind, "openvino", prompts)
    assert tokens_of(genai, pipeline(kind, backend), prompts) == expected


@pytest.mark.parametrize("row", [0, 1], ids=["short", "long"])
def test_beam_search(
    kind: str, row: int, genai: Any, pipeline: Pipeline, beams: Any, prompts: Any
) -> None:
    options = {"num_beams": 3, "num_return_sequences": 1, "max_new_tokens": 24}
    found = tokens_of(genai, pipeline(kind), [prompts[row]], **options)
    assert found == [beams(kind, "openvino", prompts[row])]


def test_paged_attention_serves_softmax(
    genai: Any, bundle: Callable[[str], Path], greedy: Any, prompts: Any
) -> None:
    pipe = genai.LLMPipeline(str(bundle("softmax")), "CPU", ATTENTION_BACKEND="PA", **F32)
    assert tokens_of(genai, pipe, prompts) == greedy("softmax", "openvino", prompts)


@pytest.mark.parametrize("recurrent", NOT_PAGED)
def test_paged_attention_refuses_recurrent_layers(
    recurrent: str, genai: Any, bundle: Callable[[str], Path]
) -> None:
    """So the default backend, which gives the right tokens above, has silently gone to SDPA."""
    with pytest.raises(RuntimeError, match=NOT_PAGED[recurrent]):
        genai.LLMPipeline(str(bundle(recurrent)), "CPU", ATTENTION_BACKEND="PA", **F32)


def test_engine_defaults(
    kind: str, genai: Any, bundle: Callable[[str], Path], greedy: Any, prompts: Any
) -> None:
    """With no setting the plug-in takes bf16 where the CPU has it, and may say something else."""
    import openvino as ov

    pipe = genai.LLMPipeline(str(bundle(kind)), "CPU")
    (written,) = tokens_of(genai, pipe, prompts[1:])
    assert len(written) == 32
    compiled = ov.Core().compile_model(bundle(kind) / "openvino_model.xml", "CPU")
    if compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32:
        assert [written] == greedy(kind, "openvino", prompts[1:])


@pytest.mark.parametrize("templated", [False, True], ids=["plain", "chat-template"])
def test_text_in_text_out(
    kind: str, templated: bool, genai: Any, pipeline: Pipeline, opened: Any
) -> None:
    ours = opened(kind, "openvino")
    prompt = ours.chat_prompt([user(TEXTS[0])]) if templated else TEXTS[0]
    settings = configured(genai, apply_chat_template=templated)
    expected = ours.generate(prompt, max_new_tokens=32, ignore_eos=True)
    assert pipeline(kind).generate(TEXTS[0], settings) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_side_by_side(
    kind: str, backend: str, genai: Any, pipeline: Pipeline, opened: Any
) -> None:
    """The tokenizer IR must pad on the left: padding on the right would be read as text."""
    expected = opened(kind, "openvino").generate(TEXTS, max_new_tokens=32, ignore_eos=True)
    settings = configured(genai, apply_chat_template=False)
    assert pipeline(kind, backend).generate(TEXTS, settings).texts == expected


def test_conversation(kind: str, genai: Any, pipeline: Pipeline, opened: Any) -> None:
    ours, pipe = opened(kind, "openvino"), pipeline(kind)
    history, messages = genai.ChatHistory(), []
    for text in ("Hello", "And then?"):
        history.append(user(text))
        messages.append(user(text))
        answer = pipe.generate(history, configured(genai)).texts[0]
        prompt = ours.chat_prompt(messages)
        assert answer == ours.generate(prompt, max_new_tokens=32, ignore_eos=True)
        history.append({"role": "assistant", "content": answer})
        messages.append({"role": "assistant", "content": answer})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
