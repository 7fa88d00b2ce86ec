"""Stage 1: gradients reach what is new and nothing else; padding does not count."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgekit.distill.recipe import Transfer
from edgekit.distill.stage import TorchBatch
from edgekit.distill.transfer import PAPER_FACTOR, TransferStage
from edgekit.models.decoder import Decoder
from edgekit.testing import TOLERANCE, assert_close

Pair = Callable[..., tuple[Decoder, Decoder]]
CONFIG = Transfer(tokens=1, lr=1e-2)


def stage_over(pair: Pair, config: Transfer = CONFIG, **overrides: Any) -> TransferStage:
    return TransferStage(*pair(**overrides), config, contextlib.nullcontext)


def whole(ids: torch.Tensor, mask: torch.Tensor | None = None) -> TorchBatch:
    return TorchBatch(ids, ids.roll(-1, dims=1), mask)


def padded(ids: torch.Tensor, extra: int) -> TorchBatch:
    filler = torch.full((len(ids), extra), 7)
    mask = torch.cat((torch.ones_like(ids), torch.zeros_like(filler)), dim=1)
    return whole(torch.cat((ids, filler), dim=1), mask)


def gradients(stage: TransferStage, batch: TorchBatch) -> dict[str, torch.Tensor]:
    for parameter in stage.tensors().values():
        parameter.grad = None
    stage.accumulate(batch, batch)
    return {n: p.grad.clone() for n, p in stage.tensors().items() if p.grad is not None}


@pytest.mark.parametrize("mixer", ["lawcat", "lolcats"])
def test_gradient_reaches_every_new_tensor_and_no_frozen_one(
    pair: Pair, ids: torch.Tensor, mixer: str
) -> None:
    teacher, student = pair(mixer=mixer)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    stage = TransferStage(teacher, student, CONFIG, contextlib.nullcontext)
    stage.prepare(whole(ids))
    found = gradients(stage, whole(ids))
    assert set(found) == {n for n, p in student.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 0 for grad in found.values())
    assert all(p.grad is None for n, p in student.named_parameters() if n not in found)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[n], tensor) for n, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("mixer", ["lawcat", "lolcats"])
def test_padding_changes_neither_loss_nor_gradient(
    pair: Pair, ids: torch.Tensor, mixer: str
) -> None:
    stage = stage_over(pair, mixer=mixer)
    stage.prepare(whole(ids))
    losses = [stage.accumulate(b, b) for b in (whole(ids), padded(ids, 9))]
    assert_close("loss", *losses, ratio=TOLERANCE["float32"])
    plain, with_padding = gradients(stage, whole(ids)), gradients(stage, padded(ids, 9))
    for name, grad in plain.items():
        assert_close(name, grad, with_padding[name], ratio=TOLERANCE["float32"])


def test_rows_drop_the_columns_that_are_padding_in_all_of_them(ids: torch.Tensor) -> None:
    batch = padded(ids, 9)
    assert batch.mask is not None
    batch.mask[0, 4:] = 0
    short, mixed, full = batch.rows(0, 1), batch.rows(0, 2), batch.rows(1, 2)
    assert short.mask is full.mask is None
    assert short.ids.tolist() == batch.ids[:1, :4].tolist()
    assert full.ids.tolist() == ids[1:2].tolist()
    assert mixed.ids.shape == mixed.targets.shape == (2, ids.shape[1])
    assert mixed.mask is not None
    assert (mixed.positions, short.positions + full.positions) == (4 + ids.shape[1],) * 2


def test_variance_ignores_padding(pair: Pair, ids: torch.Tensor) -> None:
    stage = stage_over(pair)
    measured = []
    for batch in (whole(ids), padded(ids, 9)):
        stage.prepare(batch)
        measured.append(stage.buffers()["variance"].clone())
    assert_close("variance", *measured, ratio=TOLERANCE["float32"])


def test_micro_batches_add_up_to_the_step(pair: Pair, ids: torch.Tensor) -> None:
    stage, batch = stage_over(pair), whole(ids)
    stage.prepare(batch)
    at_once = stage.accumulate(batch, batch)
    together = gradients(stage, batch)
    for parameter in stage.tensors().values():
        parameter.grad = None
    parts = sum(stage.accumulate(batch.rows(i, i + 1), batch) for i in range(len(ids)))
    assert_close("loss", at_once, parts, ratio=TOLERANCE["float32"])
    for name, parameter in stage.tensors().items():
        assert_close(name, together[name], parameter.grad, ratio=TOLERANCE["float32"])


def test_paper_weighting_is_1000_times_the_mean_over_layers(pair: Pair, ids: torch.Tensor) -> None:
    ours = stage_over(pair)
    papers = stage_over(pair, Transfer(tokens=1, lr=1e-2, weighting="paper"))
    for stage in (ours, papers):
        stage.prepare(whole(ids))
    by_variance, by_paper = gradients(ours, whole(ids)), gradients(papers, whole(ids))
    for layer, variance in enumerate(ours.buffers()["variance"].tolist()):
        name = f"model.layers.{layer}.self_attn.feature_map.weight"
        expected = by_variance[name] * variance * PAPER_FACTOR / 3
        assert_close(name, expected, by_paper[name], ratio=TOLERANCE["float32"])
    assert [len(g) for g in papers.clipped_together()] == [18]
    assert [len(g) for g in ours.clipped_together()] == [6, 6, 6]


def test_softmax_layers_are_left_alone(pair: Pair, ids: torch.Tensor) -> None:
    stage = stage_over(pair, softmax_layers=[0, 2])
    stage.prepare(whole(ids))
    assert stage.parts == ["layer 1"]
    assert {name.split(".")[2] for name in stage.tensors()} == {"1"}


def test_learning_lowers_the_loss(pair: Pair, ids: torch.Tensor) -> None:
    stage, batch = stage_over(pair), whole(ids)
    stage.prepare(batch)
    optimizer = torch.optim.AdamW([p for g in stage.groups() for p in g.parameters], lr=1e-2)
    first = stage.accumulate(batch, batch)
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        last = stage.accumulate(batch, batch)
    assert (last < 0.8 * first).all()
