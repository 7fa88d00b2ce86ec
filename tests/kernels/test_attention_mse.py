"""The stage-1 loss: the definition, its gradient, padding, and the Triton form."""

import pytest
import torch

from edgekit.errors import UsageError
from edgekit.kernels.attention_mse import attention_mse, reference
from edgekit.testing import TOLERANCE, assert_close

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interp),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 63, 2, 40), (2, 65, 320)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    y, expected = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    return y, expected


def padding(shape: tuple[int, ...]) -> torch.Tensor:
    mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(8)) < 0.7
    mask[0, 0] = True
    return mask


def test_is_the_sum_of_squares_of_valid_positions() -> None:
    y, expected = inputs((2, 3, 4), torch.float64)
    assert_close(
        "all", ((y - expected) ** 2).sum(), attention_mse(y, expected), ratio=TOLERANCE["float64"]
    )
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    kept = mask.bool()
    by_hand = ((y[kept] - expected[kept]) ** 2).sum()
    actual = attention_mse(y, expected, mask)
    assert_close("masked", by_hand, actual, ratio=TOLERANCE["float64"])


def test_gradients() -> None:
    y, expected = inputs((2, 3, 4), torch.float64)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda value: attention_mse(value, expected, mask), y.requires_grad_()
    )
    expected.requires_grad_()
    attention_mse(y, expected).backward()
    assert expected.grad is None


def test_refuses_what_does_not_fit() -> None:
    y, expected = inputs((2, 3, 4), torch.float32)
    with pytest.raises(UsageError, match="one shape"):
        attention_mse(y, expected[:1])
    with pytest.raises(UsageError, match="mask"):
        attention_mse(y, expected, torch.ones(2, 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused(shape: tuple[int, ...], dtype: torch.dtype, masked: bool, device: str) -> None:
    fused = pytest.importorskip("edgekit.kernels.attention_mse.fused")
    y, expected = inputs(shape, dtype)
    mask = padding(shape) if masked else None
    double = y.double().requires_grad_()
    there = y.to(device).requires_grad_()
    if mask is not None:
        there = torch.where(mask.view(*shape[:2], *(1,) * len(shape[2:])), y, torch.nan)
        there = there.to(device).requires_grad_()
        mask = mask.to(device)
    loss = reference.attention_mse(double, expected.double(), None if mask is None else mask.cpu())
    actual = fused.attention_mse(there, expected.to(device), mask)
    assert actual.dtype == torch.float32
    assert_close("loss", loss, actual, ratio=TOLERANCE["float32"])
    (gradient,) = torch.autograd.grad(0.3 * loss, double)
    (actual_gradient,) = torch.autograd.grad(0.3 * actual, there)
    assert actual_gradient.dtype == dtype
    ratio = TOLERANCE[str(dtype).removeprefix("torch.")]
    assert_close("gradient", gradient, actual_gradient, ratio=ratio)


@pytest.mark.parametrize("device", DEVICES)
def test_fused_mixes_dtypes_and_declines_fp64(device: str) -> None:
    fused = pytest.importorskip("edgekit.kernels.attention_mse.fused")
    y, expected = (t.to(device) for t in inputs((2, 3, 5), torch.float32))
    actual = fused.attention_mse(y, expected.bfloat16())
    wanted = reference.attention_mse(y.double(), expected.bfloat16().double())
    assert_close("loss", wanted, actual, ratio=TOLERANCE["float32"])
    with pytest.raises(UsageError, match="float64"):
        fused.attention_mse(y.double(), expected)
