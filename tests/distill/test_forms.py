"""A step of either stage learns the same whichever form of the kernels it takes."""

import contextlib
from collections.abc import Callable

import pytest
import torch

from edgekit.distill.recipe import Recipe
from edgekit.distill.stage import Stage, TorchBatch
from edgekit.distill.transfer import TransferStage
from edgekit.distill.tuning import TuningStage, inject_pairs
from edgekit.kernels.dispatch import Form, forced
from edgekit.models.decoder import Decoder
from edgekit.testing import assert_close

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interp),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
Pair = Callable[..., tuple[Decoder, Decoder]]


def rows(device: str) -> TorchBatch:
    """Two rows of more than a chunk, the last one ending early."""
    ids = torch.randint(3, 320, (2, 70), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[-1, -9:] = 0
    return TorchBatch(*(x.to(device) for x in (ids, ids.roll(-1, dims=1), mask)))


def transfer_stage(pair: Pair, smoke: Callable[..., Recipe], device: str) -> Stage:
    teacher, student = (model.to(device) for model in pair())
    return TransferStage(teacher, student, smoke().transfer, contextlib.nullcontext)


def tuning_stage(pair: Pair, smoke: Callable[..., Recipe], device: str) -> Stage:
    teacher, student = (model.to(device) for model in pair())
    inject_pairs(student, smoke().tuning, {}, seed=1)
    return TuningStage(teacher, student, smoke().tuning, contextlib.nullcontext)


def learned(stage: Stage, batch: TorchBatch, form: Form) -> dict[str, torch.Tensor]:
    """The losses of a step, and every gradient."""
    stage.prepare(batch)
    with forced(form):
        losses = stage.accumulate(batch, batch)
    found = {name: p.grad.cpu() for name, p in stage.tensors().items() if p.grad is not None}
    return {"losses": losses, **found}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [transfer_stage, tuning_stage])
def test_a_step_is_the_same(
    make: Callable[..., Stage], pair: Pair, smoke: Callable[..., Recipe], device: str
) -> None:
    expected = learned(make(pair, smoke, device), rows(device), "torch")
    actual = learned(make(pair, smoke, device), rows(device), "triton")
    assert expected.keys() == actual.keys()
    assert len(expected) > 10
    for name, wanted in expected.items():
        assert_close(name, wanted, actual[name], ratio=1e-4)
