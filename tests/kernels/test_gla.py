"""The reference of gated linear attention: gradients, one gate per head, packed sequences."""

import itertools

import pytest
import torch

from edgekit.errors import UsageError
from edgekit.kernels import sequences
from edgekit.kernels.gla import chunked, gla, reference
from edgekit.kernels.sequences import Sequences, sequence_offsets
from edgekit.testing import TOLERANCE, assert_close

FORMS = {
    "recurrent": reference.recurrent_gla,
    "parallel": reference.parallel_gla,
    "chunked": reference.chunked_gla,
    "by-hand": chunked.chunked_gla,
    "dispatched": gla,
}


def inputs(time: int, gates: int, sequences: int = 1) -> list[torch.Tensor]:
    """H = 4, S = 2, F = 3, V = 2, in fp64, requiring gradients."""
    q, k, v, g = (
        torch.rand(1, time, heads, width, dtype=torch.float64) + 0.1
        for heads, width in ((4, 3), (2, 3), (2, 2), (2, gates))
    )
    state = torch.rand(sequences, 2, 3, 3, dtype=torch.float64) + 0.1
    return [x.requires_grad_() for x in (q, k, v, (-g).detach(), state)]


@pytest.mark.parametrize("gates", [3, 1], ids=["a gate per feature", "a gate per head"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "scaled"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_differences(form: str, normalise: bool, gates: int) -> None:
    leaves = inputs(5, gates)
    assert torch.autograd.gradcheck(lambda *x: FORMS[form](*x, normalise=normalise), leaves)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_packed_sequences(form: str) -> None:
    borders = torch.tensor([0, 1, 1, 4])
    leaves = inputs(4, 3, sequences=3)
    assert torch.autograd.gradcheck(lambda *x: FORMS[form](*x, cu_seqlens=borders), leaves)


@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_do_not_meet(form: str) -> None:
    borders = [0, 1, 66, 66, 70]
    packed = inputs(70, 3, sequences=4)
    output, after = FORMS[form](*packed, cu_seqlens=torch.tensor(borders))
    for n, (start, end) in enumerate(itertools.pairwise(borders)):
        state = packed[4][n : n + 1]
        if start == end:
            assert torch.equal(after[n : n + 1], state)
            continue
        alone = FORMS[form](*(x[:, start:end] for x in packed[:4]), state)
        assert_close("output", alone[0], output[:, start:end], ratio=TOLERANCE["float64"])
        assert_close("state", alone[1], after[n : n + 1], ratio=TOLERANCE["float64"])


def test_borders_out_of_a_table_are_read_in_order() -> None:
    table = torch.tensor([[0, 9], [3, 9], [7, 9]], dtype=torch.int32)
    offsets = sequence_offsets(torch.zeros(1, 7, 1, 1), table[:, 0])
    assert offsets.is_contiguous()
    assert offsets.tolist() == [0, 3, 7]


@pytest.mark.parametrize("borders", [[0, 3], [1, 7], [0, 5, 3, 7], [0, 9]])
def test_borders_that_miss_a_token_are_refused(borders: list[int]) -> None:
    with pytest.raises(UsageError, match="from 0 to 7"):
        sequence_offsets(torch.zeros(1, 7, 1, 1), torch.tensor(borders))


def test_no_sequence_has_no_chunk() -> None:
    first, owner = Sequences.of(torch.zeros(0, 0, 1, 1), None).chunks(64)
    assert (first.tolist(), owner.tolist()) == ([0], [])


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("time", [1, 15, 16, 17, 40])
def test_equal_sequences_are_cut_like_packed_ones(time: int, before: int) -> None:
    even = Sequences.of(torch.zeros(3, time, 1, 1), None)
    row = torch.zeros(1, 3 * time, 1, 1)
    packed = Sequences.of(row, torch.arange(4, dtype=torch.int64) * time)
    (first, owner), (others, owners) = (x.chunks(16, before=before) for x in (even, packed))
    assert torch.equal(even.offsets, packed.offsets)
    assert torch.equal(first, others)
    assert owner.tolist() == owners.tolist()[: len(owner)]
    assert set(owners.tolist()[len(owner) :]) <= {3}


def test_a_table_made_without_autograd_serves_it_later() -> None:
    sequences._made.cache_clear()
    x = torch.zeros(2, 37, 1, 1, requires_grad=True)
    with torch.inference_mode():
        made = Sequences.of(x, None)
        made.chunks(16)
    made = Sequences.of(x, None)
    rows = made.chunks(16)[1].long()
    (grad,) = torch.autograd.grad(x[rows].sum(), x)  # it keeps the rows
    assert grad[0].sum() == len(rows) // 2 * 37
