"""Stage 2: what is trained, what the head reads, and that pairs come back as they were."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgekit.distill.recipe import Tuning
from edgekit.distill.stage import TorchBatch
from edgekit.distill.tuning import TuningStage, inject_pairs, pairs
from edgekit.errors import UsageError
from edgekit.kernels.kl_loss.reference import IGNORE
from edgekit.models.decoder import Decoder
from edgekit.testing import TOLERANCE, assert_close

Pair = Callable[..., tuple[Decoder, Decoder]]


def tuning(**settings: Any) -> Tuning:
    return Tuning(**{"tokens": 1, "lr": 1e-3, "rank": 3, "kl_weight": 1.0, **settings})


def stage_over(pair: Pair, config: Tuning, **overrides: Any) -> TuningStage:
    teacher, student = pair(**overrides)
    inject_pairs(student, config, {}, seed=1)
    return TuningStage(teacher, student, config, contextlib.nullcontext)


def batch_of(ids: torch.Tensor, mask: torch.Tensor | None = None) -> TorchBatch:
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    return TorchBatch(ids, targets if mask is None else targets.where(mask > 0, IGNORE), mask)


def test_fresh_pairs_change_nothing(pair: Pair, ids: torch.Tensor) -> None:
    _, student = pair()
    before, _ = student(ids)
    inject_pairs(student, tuning(), {}, seed=1)
    after, _ = student(ids)
    assert torch.equal(before, after)


def test_pairs_of_a_seed_are_the_same(pair: Pair) -> None:
    found = []
    for _ in range(2):
        _, student = pair()
        inject_pairs(student, tuning(), {}, seed=4)
        found.append(pairs(student))
    assert all(torch.equal(p.a, found[1][n].a) for n, p in found[0].items())


def test_pairs_go_on_from_an_earlier_student(pair: Pair, ids: torch.Tensor) -> None:
    _, first = pair()
    inject_pairs(first, tuning(rank=3, alpha=7), {}, seed=1)
    for module in first.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    _, second = pair()
    inject_pairs(second, tuning(rank=5, alpha=3), pairs(first), seed=2)
    assert_close("logits", first(ids)[0], second(ids)[0], ratio=TOLERANCE["float32"])


def test_pairs_that_do_not_fit_are_refused(pair: Pair) -> None:
    _, first = pair()
    inject_pairs(first, tuning(rank=3), {}, seed=1)
    _, second = pair()
    with pytest.raises(UsageError, match="rank 3"):
        inject_pairs(second, tuning(rank=2), pairs(first), seed=1)
    _, third = pair()
    with pytest.raises(UsageError, match="k_proj"):
        inject_pairs(third, tuning(rank=3, targets=["q_proj"]), pairs(first), seed=1)


@pytest.mark.parametrize("mixer_lr", [0.0, 1e-3], ids=["mixers frozen", "mixers trained"])
def test_gradient_reaches_what_has_a_rate(pair: Pair, ids: torch.Tensor, mixer_lr: float) -> None:
    stage = stage_over(pair, tuning(mixer_lr=mixer_lr))
    stage.accumulate(batch_of(ids), batch_of(ids))
    reached = {n for n, p in stage.tensors().items() if p.grad is not None}
    expected = {n for n in stage.tensors() if ".lora_" in n or mixer_lr}
    assert reached == expected
    assert len([n for n in reached if ".lora_" in n]) == 3 * 4 * 2
    rated = {id(p) for group in stage.groups() for p in group.parameters}
    assert rated == {id(stage.tensors()[n]) for n in expected}


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_padding_changes_no_loss(pair: Pair, ids: torch.Tensor, kl_weight: float) -> None:
    stage = stage_over(pair, tuning(kl_weight=kl_weight))
    mask = torch.ones_like(ids)
    filler = torch.full((len(ids), 9), 7)
    longer = torch.cat((ids, filler), dim=1)
    padding = torch.cat((mask, torch.zeros_like(filler)), dim=1)
    plain = batch_of(ids)
    targets = torch.cat((plain.targets, torch.full_like(filler, IGNORE)), dim=1)
    padded = TorchBatch(longer, targets, padding)
    losses = [stage.accumulate(b, b) for b in (plain, padded)]
    assert_close("loss", *losses, ratio=TOLERANCE["float32"])


def test_without_kl_the_teacher_is_not_run(pair: Pair, ids: torch.Tensor) -> None:
    teacher, student = pair()
    inject_pairs(student, tuning(kl_weight=0.0), {}, seed=1)
    stage = TuningStage(teacher, student, tuning(kl_weight=0.0), contextlib.nullcontext)
    seen: list[object] = []
    teacher.model.norm.register_forward_hook(lambda *_: seen.append(1))
    loss = stage.accumulate(batch_of(ids), batch_of(ids))
    assert not seen
    assert loss[1] == 0


def test_layers_with_softmax_get_no_pairs(pair: Pair) -> None:
    _, student = pair(softmax_layers=[1])
    inject_pairs(student, tuning(targets=["q_proj", "down_proj"]), {}, seed=1)
    assert sorted(pairs(student)) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.2.self_attn.q_proj",
    ]
