"""Which heads are turned down, for which queries.

The `kept` heads with the largest scores keep their output, the others' is multiplied with alpha; of
equal scores the first head's counts as larger, as ONNX TopK has it. Nothing is renormalised, and a
query outside the gate keeps all its heads.
"""

import torch

from edgekit.spin.config import Lowering, Queries

__all__ = ["gated_queries", "kept_by_rank", "kept_by_topk", "multipliers"]


def kept_by_topk(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The heads with the largest scores, by sorting.

    Args:
        scores: `[B, H, T]`.
        kept: heads of H.

    Returns:
        bool `[B, H, T]`.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :kept], True)


def kept_by_rank(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The same heads by counting those that are ahead of each; arguments of `kept_by_topk`."""
    mine, other = scores[:, :, None], scores[:, None]  # [B, H, 1, T] and [B, 1, H, T]
    heads = torch.arange(scores.shape[1], device=scores.device)
    earlier = (heads[None, :] < heads[:, None])[None, ..., None]
    ahead = (other > mine) | (earlier & (other == mine))
    return ahead.sum(dim=2) < kept


def gated_queries(
    image: torch.Tensor, visible: torch.Tensor, queries: Queries, start: int
) -> torch.Tensor:
    """The queries whose heads are turned down: none of those that see no image.

    Args:
        image: where keys belong to an image, bool `[B, L]`.
        visible: keys that each query sees, bool `[B or 1, 1, T, L]`.
        queries: see `SpinConfig.queries`.
        start: the key that belongs to the first query.

    Returns:
        bool `[B, T]`.
    """
    sees = (visible[:, 0] & image[:, None]).any(dim=-1)
    if queries == "text":
        return sees & ~image[:, start : start + sees.shape[1]]
    last = torch.zeros_like(sees)
    last[:, -1] = sees[:, -1]
    return last


def multipliers(
    scores: torch.Tensor, gate: torch.Tensor, kept: int, alpha: float, lowering: Lowering
) -> torch.Tensor:
    """What each head's output is multiplied with: 1 + gate (mu - 1), mu being 1 or alpha.

    Args:
        scores: `[B, H, T]`.
        gate: of queries, bool `[B, T]`.
        kept: heads of H.
        alpha: see `SpinConfig.alpha`.
        lowering: see `SpinConfig.lowering`.

    Returns:
        `[B, H, T]` in the scores' dtype.
    """
    choose = kept_by_topk if lowering == "topk" else kept_by_rank
    whole = choose(scores, kept) | ~gate[:, None]
    return torch.where(whole, 1.0, alpha).to(scores.dtype)
