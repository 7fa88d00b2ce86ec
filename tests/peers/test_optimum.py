"""`optimum.intel.OVModelForCausalLM` on our bundles."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekit.runtime.generation import left_padded

pytestmark = [
    pytest.mark.peer,
    # Optimum asks for it when it reorders beams.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
]

F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


@pytest.fixture(scope="module")
def optimum(bundle: Callable[[str], Path]) -> Callable[[str], Any]:
    intel = importlib.import_module("optimum.intel")
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            made[name] = intel.OVModelForCausalLM.from_pretrained(bundle(name), ov_config=F32)
        return made[name]

    return make


def written(model: Any, prompts: Any, count: int, **settings: Any) -> list[list[int]]:
    """What `generate` adds to prompts that are padded on the left."""
    ids, mask = (torch.from_numpy(array) for array in left_padded(prompts))
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    return found[:, ids.shape[1] :].tolist()


def test_greedy_tokens_are_ours_and_state_is_reset(
    bundle_name: str, optimum: Any, greedy: Any, prompt_of: Any
) -> None:
    prompt = prompt_of(bundle_name)
    expected = greedy(bundle_name, "openvino", [prompt])
    assert written(optimum(bundle_name), [prompt], 32) == expected
    assert written(optimum(bundle_name), [prompt], 32) == expected


def test_batch_with_left_padding(kind: str, optimum: Any, greedy: Any, prompts: Any) -> None:
    assert written(optimum(kind), prompts, 32) == greedy(kind, "openvino", prompts)


def test_beam_search(kind: str, optimum: Any, beams: Any, greedy: Any, prompts: Any) -> None:
    expected = [beams(kind, "openvino", prompt) for prompt in prompts]
    assert expected != greedy(kind, "openvino", prompts, 24), (
        "beams that change nothing show nothing"
    )
    alone = [written(optimum(kind), [prompt], 24, num_beams=3)[0] for prompt in prompts]
    assert alone == expected
    assert written(optimum(kind), prompts, 24, num_beams=3) == expected
