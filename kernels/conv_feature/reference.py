"""Causal depthwise convolution and softmax feature map (LAWCAT, arXiv 2509.18467).

    y[t, c] = sum_j w[c, j] x[t - (K-1) + j, c]
    phi(x)  = max(concat(softmax(x W), softmax(-x W)), 1e-12)

w[:, K-1] multiplies the current token; phi works per head, its softmax over the f columns of W.

Shapes: B batch, T time, N sequences (B of them, or any number packed into one row), H heads of d
inputs and f columns, C = H d channels, K taps.
"""

import itertools

import torch

from edgekit.errors import UsageError
from edgekit.kernels.conv_feature.shifted import shifted_sum
from edgekit.kernels.precision import widened
from edgekit.kernels.sequences import sequence_offsets

__all__ = ["causal_conv", "check_arguments", "conv_feature", "feature_map", "positive_features"]

FEATURE_FLOOR = 1e-12


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
    """Causal convolution, then the features of each head: `feature_map(causal_conv(x))`.

    Args:
        x: queries or keys of H heads `[B, T, H, d]`, T of any size from 1.
        taps: of the convolution, `[H d, K]`.
        weight: one feature matrix per head, `[H, d, f]`.
        tail: the K - 1 inputs before each sequence, `[N, H d, K - 1]`, or None for zeros.
        mask: 1 for tokens, 0 for padding, `[B, T]`, as in `causal_conv`; not with `cu_seqlens`.
        cu_seqlens: integers `[N + 1]` from 0 to T, rising, on `x`'s device, where sequences begin
            and the last one ends; B must then be 1, and nothing crosses a border. None: N = B.
        dtype: of the features; None: fp32, or fp64 if an argument is fp64.

    Returns:
        phi `[B, T, H, 2 f]`, at least 1e-12, and the last K - 1 valid inputs of each sequence (of
        its tail, if it has fewer), `[N, H d, K - 1]`, in the wider of the dtypes of `x` and `tail`.

    Raises:
        UsageError: if shapes do not fit, or `mask` and `cu_seqlens` are both given.
    """
    check_arguments(x, taps, weight, tail, mask, cu_seqlens)
    channels = x.flatten(2)
    if cu_seqlens is None:
        mixed, after = causal_conv(channels, taps, tail, mask)
    else:
        mixed, after = _each_sequence(channels, taps, tail, cu_seqlens)
    wide = torch.promote_types(mixed.dtype, weight.dtype)
    phi = feature_map(mixed.reshape(*mixed.shape[:2], *x.shape[2:]).to(wide), weight.to(wide))
    return phi if dtype is None else phi.to(dtype), after


def check_arguments(
    x: torch.Tensor,
    taps: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Check what `conv_feature` was given.

    Raises:
        UsageError: if shapes do not fit, or `mask` and `cu_seqlens` are both given.
    """
    if mask is not None and cu_seqlens is not None:
        raise UsageError(
            "mask and cu_seqlens given; allowed: one of them. Packed rows hold no padding: leave "
            "the mask out"
        )
    if x.ndim != 4 or x.shape[1] < 1:
        raise UsageError(f"x {list(x.shape)} given; allowed: [B, T, H, d] with T from 1")
    batch, time, heads, width = x.shape
    sequences = batch if cu_seqlens is None else len(sequence_offsets(x, cu_seqlens)) - 1
    wanted = {
        "taps": (taps, (heads * width, taps.shape[-1])),
        "weight": (weight, (heads, width, weight.shape[-1])),
        "tail": (tail, (sequences, heads * width, taps.shape[-1] - 1)),
        "mask": (mask, (batch, time)),
    }
    for name, (given, shape) in wanted.items():
        if given is not None and given.shape != shape:
            raise UsageError(
                f"{name} {list(given.shape)} given; allowed for x {list(x.shape)}: {list(shape)}"
            )


def _each_sequence(
    x: torch.Tensor, taps: torch.Tensor, tail: torch.Tensor | None, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_conv` of each sequence of a packed row on its own."""
    borders = cu_seqlens.tolist()
    outputs, tails = [], []
    for n, (start, end) in enumerate(itertools.pairwise(borders)):
        before = None if tail is None else tail[n : n + 1]
        y, after = causal_conv(x[:, start:end], taps, before)
        outputs.append(y)
        tails.append(after)
    return torch.cat(outputs, dim=1), torch.cat(tails)


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
