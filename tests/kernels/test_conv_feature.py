"""Convolution and feature map as one op: the definition, packed rows, gradients, refusals."""

import pytest
import torch

from edgekit.errors import UnsupportedError, UsageError
from edgekit.kernels import dispatch
from edgekit.kernels.conv_feature import conv_feature
from edgekit.testing import TOLERANCE, assert_close

HEADS, WIDTH, COLUMNS = 2, 5, 3
LENGTHS = (1, 7, 2, 0, 3)


def inputs(
    batch: int, time: int, sequences: int, taps: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, time, HEADS, WIDTH, dtype=torch.float64)
    channels = HEADS * WIDTH
    kernel = torch.randn(channels, taps, dtype=torch.float64)
    weight = torch.randn(HEADS, WIDTH, COLUMNS, dtype=torch.float64)
    tail = torch.randn(sequences, channels, taps - 1, dtype=torch.float64)
    return x, kernel, weight, tail


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor((0, *lengths)).cumsum(0)


@pytest.mark.parametrize("taps", [1, 2, 4], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("time", [1, 2, 3, 9], ids=lambda t: f"T{t}")
def test_equals_the_formula_token_by_token(time: int, taps: int) -> None:
    x, kernel, weight, tail = inputs(1, time, 1, taps)
    phi, after = conv_feature(x, kernel, weight, tail)
    history = [tail[0, :, j] for j in range(taps - 1)]
    for t in range(time):
        history.append(x[0, t].flatten())
        window = torch.stack(history[len(history) - taps :], dim=1)
        y = (kernel * window).sum(dim=1).reshape(HEADS, WIDTH)
        for h in range(HEADS):
            u = (y[h, :, None] * weight[h]).sum(dim=0).exp()
            expected = torch.cat((u / u.sum(), 1 / u / (1 / u).sum()))
            assert_close("phi", expected, phi[0, t, h], ratio=TOLERANCE["float64"])
    last = history[len(history) - taps + 1 :] if taps > 1 else []
    assert after.shape == tail.shape
    for j, column in enumerate(last):
        assert torch.equal(after[0, :, j], column)


def test_a_packed_row_is_its_sequences_one_by_one() -> None:
    x, kernel, weight, tail = inputs(1, sum(LENGTHS), len(LENGTHS))
    phi, after = conv_feature(x, kernel, weight, tail, cu_seqlens=offsets(LENGTHS))
    start = 0
    for n, length in enumerate(LENGTHS):
        piece = slice(start, start + length)
        start += length
        if not length:
            assert torch.equal(after[n], tail[n])
            continue
        alone, left = conv_feature(x[:, piece], kernel, weight, tail[n : n + 1])
        assert torch.equal(phi[:, piece], alone)
        assert torch.equal(after[n], left[0])


@pytest.mark.parametrize("kind", ["batch", "padded", "packed"])
def test_gradients(kind: str) -> None:
    packed = kind == "packed"
    cu_seqlens = offsets((1, 4, 2)) if packed else None
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]) if kind == "padded" else None
    tensors = inputs(1, 7, 3) if packed else inputs(2, 4, 2)

    def op(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return conv_feature(*given, mask, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in tensors])


def test_features_are_written_in_the_dtype_asked_for() -> None:
    x, kernel, weight, _ = (t.float() for t in inputs(1, 4, 1))
    phi, after = conv_feature(x.bfloat16(), kernel, weight, dtype=torch.bfloat16)
    assert (phi.dtype, after.dtype) == (torch.bfloat16, torch.bfloat16)
    assert conv_feature(x.bfloat16(), kernel.bfloat16(), weight)[0].dtype == torch.float32


def test_refuses_what_does_not_fit() -> None:
    x, kernel, weight, tail = inputs(2, 4, 2)
    mask, borders = torch.ones(2, 4), offsets((2, 2))
    with pytest.raises(UsageError, match="one of them"):
        conv_feature(x, kernel, weight, None, mask, cu_seqlens=borders)
    with pytest.raises(UsageError, match="batch of 1"):
        conv_feature(x, kernel, weight, cu_seqlens=borders)
    with pytest.raises(UsageError, match="taps"):
        conv_feature(x, kernel[:3], weight)
    with pytest.raises(UsageError, match="weight"):
        conv_feature(x, kernel, weight[:1])
    with pytest.raises(UsageError, match="tail"):
        conv_feature(x, kernel, weight, tail[:1])
    with pytest.raises(UsageError, match="mask"):
        conv_feature(x, kernel, weight, None, mask[:, :3])
    with pytest.raises(UsageError, match="B, T, H, d"):
        conv_feature(x.flatten(2), kernel, weight)


@pytest.mark.skipif(dispatch.interpreted(), reason="then Triton runs anywhere")
def test_triton_is_not_forced_onto_a_cpu() -> None:
    x, kernel, weight, _ = inputs(1, 4, 1)
    with dispatch.forced("triton"), pytest.raises(UnsupportedError, match="CUDA"):
        conv_feature(x, kernel, weight)
