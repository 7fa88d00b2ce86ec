"""Convolution and feature map of LAWCAT's queries and keys."""

import torch

from edgekit.kernels.conv_feature import reference
from edgekit.kernels.conv_feature.limits import declined
from edgekit.kernels.dispatch import choose

__all__ = ["conv_feature"]


def conv_feature(
    x: torch.Tensor,
    taps: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal convolution, then the features of each head, in the form for `x`'s device.

    Args:
        x: queries or keys of H heads `[B, T, H, d]`, T of any size from 1.
        taps: of the convolution, `[H d, K]`.
        weight: one feature matrix per head, `[H, d, f]`.
        tail: the K - 1 inputs before each sequence, `[N, H d, K - 1]`, or None for zeros.
        mask: 1 for tokens, 0 for padding, `[B, T]`: padding before a row's first token (where the
            tail is zero) or after its last is as if absent. Not with `cu_seqlens`.
        cu_seqlens: integers `[N + 1]` from 0 to T, rising, on `x`'s device, where sequences begin
            and the last one ends; B must then be 1, and nothing crosses a border. None: N = B.
        dtype: of the features; None: fp32, or fp64 if an argument is fp64.

    Returns:
        phi `[B, T, H, 2 f]`, at least 1e-12, and the last K - 1 valid inputs of each sequence (of
        its tail, if it has fewer), `[N, H d, K - 1]`, in the wider of the dtypes of `x` and `tail`.

    Raises:
        UsageError: if shapes do not fit, or `mask` and `cu_seqlens` are both given.
        UnsupportedError: if Triton is forced where it cannot run.

    Source: LAWCAT, arXiv 2509.18467; the maths is in this folder's README.

    Example:
        >>> x, taps, weight = torch.randn(1, 5, 2, 8), torch.randn(16, 4), torch.randn(2, 8, 4)
        >>> phi, tail = conv_feature(x, taps, weight)
        >>> later, tail = conv_feature(torch.randn(1, 1, 2, 8), taps, weight, tail)
        >>> later.shape, tail.shape
        (torch.Size([1, 1, 2, 8]), torch.Size([1, 16, 3]))
    """
    reference.check_arguments(x, taps, weight, tail, mask, cu_seqlens)
    form = choose("conv_feature", x, fused=declined(x, taps, weight, tail) is None)
    if form != "triton":
        return reference.conv_feature(
            x, taps, weight, tail, mask, cu_seqlens=cu_seqlens, dtype=dtype
        )
    from edgekit.kernels.conv_feature import fused  # Triton is optional

    return fused.conv_feature(x, taps, weight, tail, mask, cu_seqlens=cu_seqlens, dtype=dtype)
