"""How far each head looks at the image (SPIN, arXiv 2505.16411, section 3).

B batch, T queries of this call, L keys (past ones and these), H query heads, G key heads, D width
of a head; m[b, j] is 1 where key j belongs to an image, s the scale of the attention.

    mass    a[b, h, t] = sum_j m[b, j] softmax_j(s q.k)     after the softmax, between 0 and 1
    logit   a[b, h, t] = sum_j m[b, j] s q.k = s q . S      S = sum_j m[b, j] k[b, g(h), j]

over the keys that the query sees. A sum of dot products is a dot product with a sum, so `logit`
needs one vector per key head. The authors divide these sums by their deviation over the heads and
apply a softmax over them; both keep the order, which is all that is used.
"""

import torch
from torch.nn import functional

from edgekit.kernels.precision import widened

__all__ = ["logit_score", "mass_score", "visible_keys"]


def visible_keys(
    mask: torch.Tensor | None, queries: int, keys: int, device: torch.device
) -> torch.Tensor:
    """Which keys each query sees.

    Args:
        mask: of the attention, broadcast to `[B, 1, T, L]`: bool, or added to the logits; None:
            causal.
        queries: T.
        keys: L.
        device: of the result.

    Returns:
        bool `[B or 1, 1, T, L]`.
    """
    if mask is None:
        rows = torch.arange(keys - queries, keys, device=device)[:, None]
        return (torch.arange(keys, device=device) <= rows)[None, None]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[..., :keys]


def mass_score(
    query: torch.Tensor,
    key: torch.Tensor,
    image: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The share of its attention that each head spends on the image.

    The indicator m stands where values would: attention to it is the mass, exactly, in whatever
    kernel computes attention.

    Args:
        query: `[B, H, T, D]`, after positions.
        key: `[B, G, L, D]`, after positions.
        image: m, bool `[B, L]`.
        visible: bool `[B or 1, 1, T, L]`.
        scale: s.

    Returns:
        fp32 (fp64 for fp64 inputs) `[B, H, T]`.
    """
    query, key = widened(query), widened(key)
    indicator = image[:, None, :, None].to(key.dtype).expand_as(key)
    seen = functional.scaled_dot_product_attention(
        query, key, indicator, attn_mask=visible, scale=scale, enable_gqa=True
    )
    # A query that sees nothing, as padding does, is NaN in some kernels.
    return seen[..., 0].nan_to_num(0.0)


def logit_score(
    query: torch.Tensor,
    key: torch.Tensor,
    image: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The sum of each head's logits on the image; arguments and result of `mass_score`."""
    query, key = widened(query), widened(key)
    counted = (visible & image[:, None, None, :]).to(key.dtype)  # [B, 1, T, L]
    total = (counted @ key)[:, :, None]  # S of each query, [B, G, 1, T, D]
    B, H, T, D = query.shape
    G = key.shape[1]
    grouped = query.reshape(B, G, H // G, T, D)
    return (scale * (grouped * total).sum(dim=-1)).reshape(B, H, T)
