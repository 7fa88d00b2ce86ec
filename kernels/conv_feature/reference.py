"""Causal depthwise convolution and softmax feature map (LAWCAT, arXiv 2509.18467).

    y[t, c] = sum_j w[c, j] x[t - (K-1) + j, c]
    phi(x)  = max(concat(softmax(x W), softmax(-x W)), 1e-12)

w[:, K-1] multiplies the current token; phi works per head, its softmax over the f columns of W.
"""

import torch

from edgekit.kernels.conv_feature.shifted import shifted_sum
from edgekit.kernels.precision import widened

__all__ = ["causal_conv", "feature_map", "positive_features"]

FEATURE_FLOOR = 1e-12


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution over time with carried history.

    Args:
        x: inputs `[B, T, C]`, T of any size from 1.
        weight: taps `[C, K]`.
        tail: the K - 1 inputs before the first, `[B, C, K - 1]`, or None for zeros.
        mask: 1 for tokens, 0 for padding, `[B, T]`; padding before a row's first token (where the
            tail is zero) or after its last leaves outputs and tail as if absent.

    Returns:
        Outputs `[B, T, C]` and the last K - 1 valid inputs `[B, C, K - 1]`.
    """
    before = weight.shape[1] - 1
    history = x.new_zeros(x.shape[0], before, x.shape[2]) if tail is None else tail.mT
    inputs = x if mask is None else x * mask[..., None].to(x.dtype)
    padded = torch.cat((history, inputs), dim=1)
    return shifted_sum(padded, weight), _last_valid(padded, mask, before)


def _last_valid(padded: torch.Tensor, mask: torch.Tensor | None, count: int) -> torch.Tensor:
    """The `count` steps that end at each row's last valid one, `[B, C, count]`."""
    if mask is None:
        recent = padded[:, padded.shape[1] - count :].mT
        return recent.clone(memory_format=torch.contiguous_format)  # a view keeps all of it alive
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    end = (mask.to(torch.int64) * steps).amax(dim=1)  # steps of the input up to the last token
    rows = end[:, None] + torch.arange(count, device=mask.device)
    return padded.gather(1, rows[..., None].expand(-1, -1, padded.shape[2])).mT.contiguous()


def feature_map(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Positive features of each head.

    Args:
        x: `[B, T, H, d]`.
        weight: one matrix per head, `[H, d, f]`.

    Returns:
        `[B, T, H, 2 f]`, at least 1e-12; each half sums to 1.
    """
    return positive_features(torch.einsum("bthd,hdf->bthf", x, weight))


def positive_features(u: torch.Tensor) -> torch.Tensor:
    """max(concat(softmax(u), softmax(-u)), 1e-12) of `u [.., f]`: fp32 `[.., 2 f]`."""
    u = widened(u)
    halves = torch.cat((u.softmax(dim=-1), (-u).softmax(dim=-1)), dim=-1)
    return halves.clamp_min(FEATURE_FLOOR)
