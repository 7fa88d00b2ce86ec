"""Causal attention that also returns each head's image mass, as its formula is written.

Query t of a call stands at position past + t and sees keys up to its own, the last `window` of them
where a window is given, none that is padding. With s the scale and m[b, j] = 1 on image keys:

    p[b, h, t, j] = softmax_j(s q[b, t, h] . k[b, j, g(h)])   of visible keys, g(h) = h // (H / G)
    o[b, t, h]    = sum_j p[b, h, t, j] v[b, j, g(h)]
    mass[b, t, h] = sum_j m[b, j] p[b, h, t, j]                in [0, 1]

SPIN (arXiv 2505.16411) ranks heads by how they look at the image; the mass is what a head spends.
"""

import torch

from edgekit.kernels.precision import widened

__all__ = ["spin_attention", "visible_keys"]


def spin_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    image: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    past: int = 0,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and image mass, all weights at once; a query that sees no key gets 0 and 0.

    Args:
        q: after positions, `[B, T, H, D]`.
        k: after positions, `[B, S, G, D]`, S = past + T; query head h reads key head h // (H / G).
        v: `[B, S, G, D]`.
        image: which keys belong to an image, bool `[B, S]`; any number of images, anywhere.
        mask: which keys are tokens and not padding, bool or 0 and 1, `[B, S]`; None: all.
        scale: of the logits; None: D^-1/2.
        past: keys before those of this call.
        window: keys that a query sees at most, its own among them; None: all.

    Returns:
        The output `[B, T, H, D]` in q's dtype, and the mass `[B, T, H]` in fp32 (fp64 for fp64).
    """
    groups = q.shape[2] // k.shape[2]
    keys, values = (widened(x).repeat_interleave(groups, dim=2) for x in (k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    seen = visible_keys(q, k, mask, past, window)
    logits = torch.einsum("bthd,bshd->bhts", widened(q), keys) * scale
    weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    weights = weights.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)
    output = torch.einsum("bhts,bshd->bthd", weights, values)
    mass = (weights * image.bool()[:, None, None, :]).sum(dim=-1)
    return output.to(q.dtype), mass.mT


def visible_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    past: int,
    window: int | None,
) -> torch.Tensor:
    """Which keys each query sees, bool `[B or 1, 1, T, S]`; arguments of `spin_attention`."""
    rows = torch.arange(past, past + q.shape[1], device=q.device)[:, None]
    columns = torch.arange(k.shape[1], device=q.device)
    seen = columns <= rows
    if window is not None:
        seen = seen & (columns > rows - window)
    return seen[None, None] if mask is None else seen & mask.bool()[:, None, None, :]
