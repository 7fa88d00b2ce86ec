"""Attention that also says how much of it each head gives to the image."""

from typing import Any

import torch

from edgekit.errors import UsageError
from edgekit.kernels.dispatch import choose
from edgekit.kernels.spin_attention import column, reference
from edgekit.kernels.spin_attention.limits import declined

__all__ = ["spin_attention"]


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
    """`reference.spin_attention` in the form that is fastest on its device.

    The Triton form is for inference; where a gradient may be asked for, plain PyTorch runs.

    Args:
        q: after positions, `[B, T, H, D]`.
        k: after positions, `[B, S, G, D]`, S = past + T; query head h reads key head h // (H / G).
        v: `[B, S, G, D]`.
        image: which keys belong to an image, bool `[B, S]`; any number of images, anywhere.
        mask: which keys are tokens and not padding, bool or 0 and 1, `[B, S]`; None: all.
        scale: of the logits, above 0; None: D^-1/2.
        past: keys before those of this call.
        window: keys that a query sees at most, its own among them; None: all.

    Returns:
        The output `[B, T, H, D]` in q's dtype, and the mass, the share of each head's weight that
        image keys have, `[B, T, H]` in fp32 (fp64 for fp64). Both are 0 where no key is visible.

    Raises:
        UsageError: for shapes that do not fit together, or a scale or window that is not above 0.
    """
    _check(q, k, v, image, mask, past)
    if (scale is not None and scale <= 0) or (window is not None and window < 1):
        raise UsageError(f"scale {scale} and window {window} given; allowed: above 0, or None")
    options: dict[str, Any] = {"mask": mask, "scale": scale, "past": past, "window": window}
    form = choose("spin_attention", q, fused=declined(q, k, v) is None)
    if form == "reference":
        return reference.spin_attention(q, k, v, image, **options)
    if form == "torch":
        return column.spin_attention(q, k, v, image, **options)
    from edgekit.kernels.spin_attention import fused as triton_form

    return triton_form.spin_attention(q, k, v, image, **options)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    image: torch.Tensor,
    mask: torch.Tensor | None,
    past: int,
) -> None:
    batch, time, heads, width = q.shape
    groups, total = k.shape[2], past + time
    if k.shape != (batch, total, groups, width) or v.shape != k.shape or heads % groups:
        raise UsageError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} given after {past} keys; "
            f"allowed: k and v of [{batch}, {total}, G, {width}], G a divisor of {heads}"
        )
    for name, flags in (("image", image), ("mask", mask)):
        if flags is not None and flags.shape != (batch, total):
            raise UsageError(
                f"{name} {list(flags.shape)} given; allowed: one flag for each key, "
                f"[{batch}, {total}]"
            )
