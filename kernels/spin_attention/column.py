"""`reference.spin_attention` by torch's attention: the mass is one more column of the values.

The column holds 1 on image keys, so what attention returns there is the mass, exactly, in whatever
kernel computes it. Queries and keys are widened by zeros: torch has kernels that never hold all
weights (flash attention) only for heads that are as wide in values as in queries. A second
attention for the mass, or one over image keys and one over the rest, costs twice the products.
"""

import torch
from torch.nn import functional

from edgekit.kernels.precision import widened
from edgekit.kernels.spin_attention.reference import visible_keys

__all__ = ["spin_attention"]

COLUMNS = 8  # on a GPU, whose kernels want widths that are multiples of 8; elsewhere one is enough


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
    """Arguments and results of the reference; the mass is rounded to the values' dtype."""
    width = q.shape[3]
    more = COLUMNS if q.is_cuda else 1
    flags = image.to(v.dtype)[:, :, None, None].expand(*v.shape[:3], more)
    wide = functional.pad(q, (0, more)), functional.pad(k, (0, more)), torch.cat((v, flags), dim=3)
    plain = mask is None and (window is None or window >= k.shape[1])
    causal = plain and past == 0
    seen = None if causal or (plain and q.shape[1] == 1) else visible_keys(q, k, mask, past, window)
    # A query that sees nothing is NaN in some kernels: it sees all, and is cleared afterwards.
    blind = None if mask is None or seen is None else ~seen.any(dim=-1, keepdim=True)
    queries, keys, values = (x.transpose(1, 2) for x in wide)
    both = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=seen if blind is None or seen is None else seen | blind,
        is_causal=causal,
        scale=width**-0.5 if scale is None else scale,
        enable_gqa=True,
    ).transpose(1, 2)
    if blind is not None:
        both = both.masked_fill(blind.transpose(1, 2), 0.0)
    return both[..., :width], widened(both[..., width])
