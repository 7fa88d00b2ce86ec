"""Normalised gated linear attention, the recurrence of LAWCAT (arXiv 2509.18467)."""

from typing import Any

import torch

from edgekit.kernels.dispatch import choose
from edgekit.kernels.gla.chunked import chunked_gla
from edgekit.kernels.gla.limits import declined
from edgekit.kernels.gla.reference import GATE_BOUND, Output, check_arguments, recurrent_gla

__all__ = ["gla"]


def gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    normalise: bool = True,
    cu_seqlens: torch.Tensor | None = None,
) -> Output:
    """`reference.recurrent_gla` in the form that is fastest on its device.

    Log decays below -2.5 count as -2.5 in every form but the reference: a state then keeps 8 % of
    itself after one token, and a product of factors from a chunk's middle stays finite.

    Raises:
        UsageError: if shapes do not fit.
        UnsupportedError: if Triton is forced where it cannot run.
    """
    check_arguments(q, k, v, g, state, cu_seqlens)
    options: dict[str, Any] = {"eps": eps, "normalise": normalise, "cu_seqlens": cu_seqlens}
    form = choose("gla", q, fused=declined(q, v) is None)
    if form == "reference":
        return recurrent_gla(q, k, v, g, state, **options)
    if form == "torch":
        return chunked_gla(q, k, v, g.clamp_min(-GATE_BOUND), state, **options)
    from edgekit.kernels.gla.fused import fused_gla

    return fused_gla(q, k, v, g, state, **options)
