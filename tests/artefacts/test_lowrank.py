"""The `lowrank` artefact: fold, unfold, and what is refused."""

import pytest
import torch

from edgekit.artefacts.lowrank import LowRank, unfold
from edgekit.errors import UsageError
from edgekit.testing import TOLERANCE, assert_close

SHAPES = [(1, 1, 1), (7, 3, 2), (63, 65, 5), (16, 64, 16)]
Shape = tuple[int, int, int]


def random_factors(out: int, width: int, rank: int, dtype: torch.dtype) -> LowRank:
    return LowRank(a=torch.randn(rank, width).to(dtype), b=torch.randn(out, rank).to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fold_adds_the_product_in_fp32(shape: Shape, dtype: torch.dtype) -> None:
    out, width, rank = shape
    factors = random_factors(out, width, rank, dtype)
    weight = torch.randn(out, width).to(dtype)
    before = weight.clone()
    folded = factors.fold(weight)
    assert folded.dtype == torch.float32
    exact = weight.double() + factors.b.double() @ factors.a.double()
    assert_close("folded", exact, folded, ratio=TOLERANCE["float32"])
    assert torch.equal(weight, before)
    assert (factors.rank, factors.shape) == (rank, (out, width))
    assert factors.bytes == rank * (out + width) * dtype.itemsize


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unfold_finds_a_difference_of_that_rank(shape: Shape) -> None:
    out, width, rank = shape
    made = random_factors(out, width, rank, torch.float32)
    rank = min(rank, out, width)
    difference = made.fold(torch.zeros(out, width))
    found, error = unfold(difference, rank)
    assert found.rank == rank
    assert error < 1e-6
    assert_close("B A", difference, found.fold(torch.zeros(out, width)), ratio=1e-5)
    assert float(found.a.norm()) == pytest.approx(float(found.b.norm()), rel=1e-4)


def test_unfold_reports_the_error_that_is_left() -> None:
    difference = torch.randn(24, 40)
    errors = []
    for rank in (1, 8, 24):
        found, error = unfold(difference, rank)
        left = difference - found.fold(torch.zeros(24, 40))
        assert error == pytest.approx(float(left.norm() / difference.norm()), abs=1e-5)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.8
    assert unfold(torch.zeros(3, 4), 1)[1] == 0.0


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (torch.zeros(2, 5), torch.zeros(4, 3), r"A \[2, 5\] and B \[4, 3\] given; allowed: A \[r"),
        (torch.zeros(5), torch.zeros(4, 1), "allowed: A"),
        (torch.zeros(0, 5), torch.zeros(4, 0), "the rank must be 1 or more"),
        (torch.full((1, 5), torch.nan), torch.zeros(4, 1), "not finite"),
        (torch.zeros(1, 5), torch.full((4, 1), torch.inf), "not finite"),
    ],
    ids=["ranks-differ", "a-vector", "rank-0", "nan", "inf"],
)
def test_factors_that_do_not_fit(a: torch.Tensor, b: torch.Tensor, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LowRank(a=a, b=b)


def test_what_fold_and_unfold_refuse() -> None:
    with pytest.raises(UsageError, match=r"a weight \[3, 4\] given; this fits \[4, 3\]"):
        random_factors(4, 3, 1, torch.float32).fold(torch.zeros(3, 4))
    for rank in (0, 4):
        with pytest.raises(UsageError, match=f"rank {rank} given; allowed: 1 to 3"):
            unfold(torch.ones(3, 4), rank)
    with pytest.raises(UsageError, match="not finite"):
        unfold(torch.full((3, 4), torch.nan), 1)
