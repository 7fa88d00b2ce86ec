import pytest
import torch

from edgekit.spin.gate import gated_queries, kept_by_rank, kept_by_topk, multipliers
from edgekit.spin.scores import visible_keys


@pytest.mark.parametrize("kept", [1, 3, 8])
@pytest.mark.parametrize("levels", [2, 1_000_000], ids=["ties", "no ties"])
def test_sorting_and_counting_choose_alike(kept: int, levels: int) -> None:
    random = torch.Generator().manual_seed(kept)
    scores = torch.randint(levels, (40, 8, 250), generator=random).float()
    chosen = kept_by_topk(scores, kept)
    assert torch.equal(chosen, kept_by_rank(scores, kept))
    assert (chosen.sum(dim=1) == kept).all()
    worst_kept = scores.masked_fill(~chosen, torch.inf).amin(dim=1)
    assert (scores.masked_fill(chosen, -torch.inf).amax(dim=1) <= worst_kept).all()


def test_the_first_of_equal_heads_is_kept() -> None:
    scores = torch.tensor([0.5, 0.2, 0.5, 0.5])[None, :, None]
    assert kept_by_topk(scores, 2)[0, :, 0].tolist() == [True, False, True, False]


def gate(image: list[int], queries: str, rows: int) -> list[bool]:
    keys = torch.tensor([image], dtype=torch.bool)
    visible = visible_keys(None, rows, len(image), keys.device)
    return gated_queries(keys, visible, queries, len(image) - rows)[0].tolist()  # type: ignore[arg-type]


def test_gated_queries() -> None:
    image = [0, 0, 1, 1, 0, 0, 1, 0]
    assert gate(image, "text", 8) == [False, False, False, False, True, True, False, True]
    assert gate(image, "text", 3) == [True, False, True]
    assert gate(image, "last", 3) == [False, False, True]
    assert gate([0, 0, 0], "text", 3) == [False] * 3
    assert gate([0, 0, 0], "last", 3) == [False] * 3


def test_a_window_that_lost_the_image_is_not_gated() -> None:
    keys = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    window = torch.tensor([[False, False, True, True]])[None, None]
    assert gated_queries(keys, window, "text", 3).tolist() == [[False]]


@pytest.mark.parametrize("lowering", ["topk", "rank"])
def test_multipliers(lowering: str) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])[None].mT  # [1, 3, 2]
    open_ = torch.tensor([[True, False]])
    found = multipliers(scores, open_, 2, 0.25, lowering)  # type: ignore[arg-type]
    assert found[0].T.tolist() == [[1.0, 0.25, 1.0], [1.0, 1.0, 1.0]]
