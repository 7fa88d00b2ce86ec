import pytest
import torch

from edgekit.kernels.head_gate.reference import (
    gated_queries,
    head_factors,
    image_sums,
    kept_by_rank,
    kept_by_topk,
    summed_logits,
)
from edgekit.testing import TOLERANCE, assert_close


@pytest.mark.parametrize("kept", [1, 3, 8])
@pytest.mark.parametrize("levels", [2, 1_000_000], ids=["ties", "no ties"])
def test_sorting_and_counting_choose_alike(kept: int, levels: int) -> None:
    random = torch.Generator().manual_seed(kept)
    scores = torch.randint(levels, (40, 250, 8), generator=random).float()
    chosen = kept_by_topk(scores, kept)
    assert torch.equal(chosen, kept_by_rank(scores, kept))
    assert (chosen.sum(dim=-1) == kept).all()
    worst_kept = scores.masked_fill(~chosen, torch.inf).amin(dim=-1)
    assert (scores.masked_fill(chosen, -torch.inf).amax(dim=-1) <= worst_kept).all()


@pytest.mark.parametrize("choose", [kept_by_topk, kept_by_rank])
def test_the_first_of_equal_heads_is_kept(choose: object) -> None:
    chosen = choose(torch.tensor([0.5, 0.2, 0.5, 0.5]), 2)  # type: ignore[operator]
    assert chosen.tolist() == [True, False, True, False]


def test_gated_queries() -> None:
    sees = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    image = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0]]).bool()
    text = gated_queries(sees, image, "text")[0].long().tolist()
    assert text == [0, 0, 0, 0, 1, 1, 0, 1]
    assert gated_queries(sees, image, "last")[0].long().tolist() == [0] * 7 + [1]
    blind = torch.zeros_like(sees)
    assert not gated_queries(blind, image, "text").any()
    assert not gated_queries(blind, image, "last").any()


@pytest.mark.parametrize("lowering", ["topk", "rank"])
def test_head_factors(lowering: str) -> None:
    scores = torch.tensor([[[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]]])
    gate = torch.tensor([[True, False]])
    found = head_factors(scores, gate, 2, 0.25, lowering)  # type: ignore[arg-type]
    assert found[0].tolist() == [[1.0, 0.25, 1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("sizes", [(1, 1, 4, 4, 8), (2, 63, 6, 2, 24), (3, 65, 9, 3, 16)], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_logits_by_a_running_sum_are_sums_of_logits(sizes: tuple[int, ...], dtype: str) -> None:
    """Keys that come in two calls, against every product of a query with a key before it."""
    B, T, H, G, D = sizes
    random = torch.Generator().manual_seed(T)
    query = torch.randn(B, T, H, D, generator=random).to(getattr(torch, dtype))
    key = torch.randn(B, T, G, D, generator=random).to(getattr(torch, dtype))
    image = torch.rand(B, T, generator=random) < 0.4
    first = image_sums(key[:, : T // 2], image[:, : T // 2]) if T > 1 else None
    past = None if first is None else first[:, -1]
    rest = image_sums(key[:, T // 2 :], image[:, T // 2 :], past)
    sums = rest if first is None else torch.cat((first, rest), dim=1)
    assert torch.equal(sums[..., -1], image.cumsum(dim=1)[..., None].expand(B, T, G).to(sums))
    repeated = key.repeat_interleave(H // G, dim=2).double()
    products = torch.einsum("bthd,bjhd->bthj", query.double(), repeated)
    counted = image[:, None] & torch.ones(T, T, dtype=torch.bool).tril()
    expected = (products * counted[:, :, None]).sum(dim=-1)
    actual = summed_logits(query, sums)
    assert actual.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    ratio = TOLERANCE["float64" if dtype == "float64" else "float32"]
    assert_close("logits", expected, actual, ratio=ratio)
