import pytest
import torch

from edgekit.kernels.head_gate.reference import (
    gated_queries,
    head_factors,
    kept_by_rank,
    kept_by_topk,
)


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
