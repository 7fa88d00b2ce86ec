"""SPIN without any cost: heads chosen beforehand, their factor folded into the output projection.

    Wo[:, h d : (h + 1) d] *= alpha

It acts on every token, those of images and of plain text too. Heads that look little at images on
average need not be those that mislead: validate a choice before it ships.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from edgekit.errors import UsageError
from edgekit.kernels.head_gate.reference import kept_by_topk
from edgekit.spin.torch_form import attention_modules

__all__ = ["HeadStatistics", "fold_static", "lowest_heads"]


class HeadStatistics:
    """How heads score over the gated queries; give its `observe` to `Spin.observed`.

    Example:
        >>> heads = HeadStatistics()                                     # doctest: +SKIP
        >>> with apply(model, config) as spin, spin.observed(heads.observe):
        ...     model.generate(**inputs)
        >>> lowest_heads(heads.scores, 2)                                # doctest: +SKIP
    """

    def __init__(self, suppress: int = 0) -> None:
        """Nothing is seen yet; `frequency` counts the `suppress` lowest heads of each query."""
        self._suppress = suppress
        self._sums: dict[int, torch.Tensor] = {}
        self._lowest: dict[int, torch.Tensor] = {}
        self._counts: dict[int, int] = {}

    def observe(self, layer: int, scores: torch.Tensor, gate: torch.Tensor) -> None:
        """Add the gated queries of one call; an `edgekit.spin.torch_form.Observer`."""
        gated = scores[gate].double().cpu()  # [N, H]
        kept = kept_by_topk(gated, gated.shape[-1] - self._suppress)
        for totals, added in ((self._sums, gated), (self._lowest, (~kept).double())):
            before = totals.get(layer, torch.zeros(gated.shape[-1], dtype=torch.float64))
            totals[layer] = before + added.sum(dim=0)
        self._counts[layer] = self._counts.get(layer, 0) + len(gated)

    @property
    def scores(self) -> dict[int, torch.Tensor]:
        """Mean score of each head by layer, fp64 `[H]`.

        Raises:
            UsageError: if no gated query was seen.
        """
        return self._mean(self._sums)

    @property
    def frequency(self) -> dict[int, torch.Tensor]:
        """Share of the queries that each head was among the lowest of, by layer, fp64 `[H]`.

        Raises:
            UsageError: if no gated query was seen.
        """
        return self._mean(self._lowest)

    def _mean(self, totals: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        if not any(self._counts.values()):
            raise UsageError("no token after an image was seen; run the model on pictures first")
        return {layer: total / self._counts[layer] for layer, total in totals.items()}


def lowest_heads(scores: Mapping[int, torch.Tensor], suppress: int) -> dict[int, list[int]]:
    """The heads of each layer with the lowest scores, in order of their number."""
    return {
        layer: sorted(mean.argsort(stable=True)[:suppress].tolist())
        for layer, mean in scores.items()
    }


@torch.no_grad()
def fold_static(
    model: PreTrainedModel, heads: Mapping[int, Sequence[int]], alpha: float
) -> PreTrainedModel:
    """Multiply some heads' columns of the output projections, in place.

    Merge adapters before this, and compress weights after it.

    Args:
        model: as for `apply`; changed.
        heads: by layer.
        alpha: 0 to 1.

    Returns:
        `model`.

    Raises:
        UsageError: for layers, heads or a factor that do not exist.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha {alpha} given; allowed: 0 to 1")
    modules = {int(module.layer_idx): module for module in attention_modules(model)}  # type: ignore[arg-type]
    count = model.config.get_text_config(decoder=True).num_attention_heads
    for layer, chosen in heads.items():
        if layer not in modules:
            raise UsageError(f"layer {layer} given; allowed: 0 to {max(modules)}")
        outside = [head for head in chosen if not 0 <= head < count]
        if outside:
            raise UsageError(f"head {outside[0]} given; allowed: 0 to {count - 1}")
        weight = cast(nn.Linear, modules[layer].o_proj).weight
        weight.view(len(weight), count, -1)[:, list(chosen)] *= alpha
    return model
