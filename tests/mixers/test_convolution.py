"""The convolution on q and k: the definition, its gradients and its tail."""

import pytest
import torch
from torch.nn import functional

from edgekit.kernels.conv_feature.reference import causal_conv
from edgekit.kernels.conv_feature.shifted import shifted_sum
from edgekit.testing import TOLERANCE, assert_close


@pytest.mark.parametrize("taps", [2, 4, 5], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("time", [1, 2, 3, 40], ids=lambda t: f"T{t}")
def test_equals_conv1d(time: int, taps: int) -> None:
    x, weight = torch.randn(2, time, 6), torch.randn(6, taps)
    tail = torch.randn(2, 6, taps - 1)
    padded = torch.cat((tail, x.mT), dim=2)
    expected = functional.conv1d(padded, weight[:, None], groups=6).mT
    y, after = causal_conv(x, weight, tail)
    assert_close("y", expected, y, ratio=TOLERANCE["float32"])
    assert torch.equal(after, padded[:, :, time:])


@pytest.mark.parametrize("frozen", ["x", "weight", "nothing"])
def test_gradients(frozen: str) -> None:
    x, weight = torch.randn(2, 7, 3).double(), torch.randn(3, 4).double()
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    assert torch.autograd.gradcheck(shifted_sum, (x, weight))


def test_gradients_pass_through_the_tail() -> None:
    x, weight = torch.randn(1, 9, 3).double(), torch.randn(3, 4).double()
    gradients = []
    for cuts in ((9,), (2, 9)):
        leaf, start, tail, loss = x.clone().requires_grad_(), 0, None, torch.zeros(())
        for stop in cuts:
            y, tail = causal_conv(leaf[:, start:stop], weight, tail)
            loss, start = loss + y.square().sum(), stop
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert_close("gradient", *gradients, ratio=TOLERANCE["float64"])


def test_sixteen_bits_are_summed_in_the_weights_precision() -> None:
    x, weight = torch.randn(1, 9, 3).bfloat16(), torch.randn(3, 4)
    y, _ = causal_conv(x, weight)
    assert y.dtype == torch.float32
    assert torch.equal(y, causal_conv(x.float(), weight)[0])
