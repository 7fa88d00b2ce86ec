import copy

import pytest
import torch

from edgekit.errors import UsageError
from edgekit.spin import SpinConfig, apply
from edgekit.spin.static import HeadStatistics, fold_static, lowest_heads
from edgekit.testing import TOLERANCE, assert_close
from edgekit.testing_vlm import IMAGE, tiny_vlm

ROW = ([5, 6], None, [7, 8, 9])


def factors(heads: list[int], alpha: float, width: int = 16) -> torch.Tensor:
    each = torch.ones(4)
    each[heads] = alpha
    return each.repeat_interleave(width)


@pytest.mark.parametrize("family", ["llava-gqa", "qwen2-vl", "gemma3"])
@torch.no_grad()
def test_folding_is_turning_heads_down_for_every_token(family: str) -> None:
    vlm = tiny_vlm(family)
    inputs, folded = vlm.inputs(ROW), copy.deepcopy(vlm.model)
    fold_static(folded, {0: [1, 3], 1: [2]}, 0.25)
    layers = vlm.model.get_decoder().layers
    for layer, heads in ((0, [1, 3]), (1, [2])):
        scale = factors(heads, 0.25)
        layers[layer].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, scale=scale: (args[0] * scale,)
        )
    expected = vlm.model(**inputs).logits
    assert_close("logits", expected, folded(**inputs).logits, ratio=TOLERANCE["float32"])


@torch.no_grad()
def test_mean_scores_are_those_of_eager_attention() -> None:
    vlm = tiny_vlm("llava")
    inputs, mean = vlm.inputs(ROW, ([5], None, [6, 7])), HeadStatistics()
    with apply(vlm.model, SpinConfig(suppress=1, alpha=1.0)) as spin, spin.observed(mean.observe):
        vlm.model(**inputs)
    vlm.model.set_attn_implementation("eager")
    image = inputs["input_ids"] == IMAGE
    text = ~image & (image.cumsum(dim=1) > 0)
    for layer, weights in enumerate(vlm.model(**inputs, output_attentions=True).attentions):
        mass = (weights * image[:, None, None]).sum(dim=-1).mT[text]
        expected = mass.double().mean(dim=0)
        assert_close("mean", expected, mean.scores[layer], ratio=TOLERANCE["float32"])


def test_lowest_heads() -> None:
    scores = {0: torch.tensor([0.5, 0.1, 0.3, 0.1]), 2: torch.tensor([0.0, 0.2, 0.1, 0.3])}
    assert lowest_heads(scores, 2) == {0: [1, 3], 2: [0, 2]}
    assert lowest_heads(scores, 0) == {0: [], 2: []}


def test_bad_choices() -> None:
    model = tiny_vlm("llava").model
    before = copy.deepcopy(model.state_dict())
    for heads, alpha, message in (
        ({2: [0]}, 0.5, "layer 2 given; allowed: 0 to 1"),
        ({0: [4]}, 0.5, "head 4 given; allowed: 0 to 3"),
        ({0: [0]}, 1.5, "alpha 1.5 given"),
    ):
        with pytest.raises(UsageError, match=message):
            fold_static(model, heads, alpha)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(UsageError, match="no token after an image"):
        _ = HeadStatistics().scores
