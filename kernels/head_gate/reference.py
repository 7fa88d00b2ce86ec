"""Turning heads down by how far they look at the image (SPIN, arXiv 2505.16411, section 3).

The `kept` heads with the largest scores keep their output, the others' is multiplied with alpha; of
equal scores the first head's counts as larger, as ONNX TopK has it. Nothing is renormalised, and a
query outside the gate keeps all its heads.

A score is either a head's share of attention on the image, or the sum of its logits there. A sum of
dot products is a dot product with a sum, so the second needs one vector per key head, S = sum of
the image keys so far; a count of them goes along, as no sum says whether there were any.
"""

from typing import Literal

import torch

from edgekit.kernels.precision import widened

__all__ = [
    "SEEN",
    "Lowering",
    "Queries",
    "gated_queries",
    "head_factors",
    "image_sums",
    "kept_by_rank",
    "kept_by_topk",
    "summed_logits",
]

Queries = Literal["text", "last"]
Lowering = Literal["topk", "rank"]
SEEN = 1e-6  # summed mass of all heads from which on a query counts as seeing an image


def kept_by_topk(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The heads with the largest scores, by sorting.

    Args:
        scores: `[..., H]`.
        kept: heads of H.

    Returns:
        bool `[..., H]`.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :kept], True)


def kept_by_rank(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The same heads by counting those that are ahead of each; arguments of `kept_by_topk`."""
    mine, other = scores[..., None], scores[..., None, :]
    heads = torch.arange(scores.shape[-1], device=scores.device)
    earlier = heads < heads[:, None]
    ahead = (other > mine) | (earlier & (other == mine))
    return ahead.sum(dim=-1) < kept


def gated_queries(sees: torch.Tensor, image: torch.Tensor, queries: Queries) -> torch.Tensor:
    """The queries whose heads are turned down: none of those that see no image.

    Args:
        sees: whether a query sees an image, bool `[B, T]`.
        image: whether it belongs to one, bool `[B, T]`.
        queries: `text` gates every token that is not of an image; `last` the last position alone,
            as the authors' code has it.

    Returns:
        bool `[B, T]`.
    """
    if queries == "text":
        return sees & ~image
    last = torch.zeros_like(sees)
    last[:, -1] = sees[:, -1]
    return last


def image_sums(
    key: torch.Tensor, image: torch.Tensor, past: torch.Tensor | None = None
) -> torch.Tensor:
    """S of every query: the image keys at or before it, summed; in the last column, their number.

    Args:
        key: of this call, after positions, `[B, T, G, D]`.
        image: which of them belong to an image, bool `[B, T]`.
        past: the sums of the last query of the call before, `[B, G, D + 1]`; None: of nothing.

    Returns:
        fp32 (fp64 for fp64 keys) `[B, T, G, D + 1]`.
    """
    key = widened(key)
    counted = torch.cat((key, torch.ones_like(key[..., :1])), dim=-1)
    sums = (counted * image[..., None, None]).cumsum(dim=1)
    return sums if past is None else sums + past[:, None]


def summed_logits(query: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Each head's logits on the image, summed: q . S, without the scale, which keeps the order.

    Args:
        query: after positions, `[B, T, H, D]`; head h reads key head h // (H / G).
        sums: what `image_sums` returned, `[B, T, G, D + 1]`.

    Returns:
        fp32 (fp64 for fp64 queries) `[B, T, H]`.
    """
    grouped = widened(query).reshape(*sums.shape[:3], -1, query.shape[3])  # [B, T, G, H / G, D]
    return (grouped * sums[..., None, :-1]).sum(dim=-1).flatten(2)


def head_factors(
    scores: torch.Tensor, gate: torch.Tensor, kept: int, alpha: float, lowering: Lowering
) -> torch.Tensor:
    """What each head's output is multiplied with: 1 + gate (mu - 1), mu being 1 or alpha.

    Args:
        scores: `[B, T, H]`.
        gate: of queries, bool `[B, T]`.
        kept: heads of H.
        alpha: what a suppressed head keeps, 0 to 1.
        lowering: how the heads are chosen; both give the same ones.

    Returns:
        `[B, T, H]` in the scores' dtype.
    """
    choose = kept_by_topk if lowering == "topk" else kept_by_rank
    whole = choose(scores, kept) | ~gate[..., None]
    return torch.where(whole, 1.0, alpha).to(scores.dtype)
