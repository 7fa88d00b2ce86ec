import pytest
import torch

from edgekit.spin.scores import logit_score, mass_score, visible_keys
from edgekit.testing import TOLERANCE, assert_close

SIZES = [(1, 4, 4, 1, 7, 8), (2, 6, 2, 5, 5, 16), (3, 9, 3, 2, 65, 24)]  # B, H, G, T, L, D


def tensors(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, H, G, T, L, D = sizes
    random = torch.Generator().manual_seed(sum(sizes))
    query = torch.randn(B, H, T, D, generator=random, dtype=torch.float64)
    key = torch.randn(B, G, L, D, generator=random, dtype=torch.float64)
    image = torch.rand(B, L, generator=random) < 0.5
    return query.to(dtype), key.to(dtype), image


def attention_logits(
    query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (scale * query @ repeated.mT).masked_fill(~visible, -torch.inf)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mass_is_the_softmax_of_image_keys(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, image = tensors(sizes)
    visible = visible_keys(None, sizes[3], sizes[4], query.device)
    weights = attention_logits(query, key, visible, 0.3).softmax(dim=-1)
    expected = (weights * image[:, None, None, :]).sum(dim=-1)
    actual = mass_score(query.to(dtype), key.to(dtype), image, visible, 0.3)
    assert_close("mass", expected, actual, ratio=TOLERANCE[str(dtype).removeprefix("torch.")])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logit_is_the_sum_over_image_keys(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, image = tensors(sizes)
    visible = visible_keys(None, sizes[3], sizes[4], query.device)
    logits = attention_logits(query, key, visible, 0.3)
    expected = logits.masked_fill(~(visible & image[:, None, None, :]), 0.0).sum(dim=-1)
    actual = logit_score(query.to(dtype), key.to(dtype), image, visible, 0.3)
    assert_close("logit", expected, actual, ratio=TOLERANCE[str(dtype).removeprefix("torch.")])


@pytest.mark.parametrize("score", [mass_score, logit_score])
def test_half_precision_is_scored_in_fp32(score: object) -> None:
    query, key, image = tensors((2, 6, 2, 5, 33, 16), torch.bfloat16)
    visible = visible_keys(None, 5, 33, query.device)
    wide = score(query.float(), key.float(), image, visible, 0.25)  # type: ignore[operator]
    narrow = score(query, key, image, visible, 0.25)  # type: ignore[operator]
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, wide)


def test_visible_keys_of_all_kinds_of_masks() -> None:
    causal = visible_keys(None, 2, 4, torch.device("cpu"))
    assert causal[0, 0].tolist() == [[True, True, True, False], [True] * 4]
    added = torch.zeros(1, 1, 2, 4).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert torch.equal(visible_keys(added, 2, 4, added.device), causal)
    assert torch.equal(visible_keys(causal, 2, 3, added.device), causal[..., :3])


def test_authors_normalisation_keeps_the_order() -> None:
    sums = torch.randn(10_000, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = (sums / sums.std(dim=1, keepdim=True)).softmax(dim=1)
    assert torch.equal(theirs.topk(5, dim=1).indices, sums.topk(5, dim=1).indices)
