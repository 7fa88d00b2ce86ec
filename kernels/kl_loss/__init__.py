"""Losses over the vocabulary: cross-entropy and distillation."""

import torch

from edgekit.kernels.dispatch import choose
from edgekit.kernels.kl_loss import chunked, reference
from edgekit.kernels.kl_loss.reference import IGNORE, check_arguments

__all__ = ["IGNORE", "vocabulary_loss"]


def vocabulary_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor | None,
    teacher_hidden: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.vocabulary_loss` in the form that is fastest on its device.

    Gradients reach `hidden` alone; the reference, when it is forced, gives them to all.

    Args:
        hidden: the student's last hidden states `[N, D]`.
        head: `[V, D]`, frozen.
        targets: token to predict at each position, int64 `[N]`; `IGNORE` counts in the KL only.
            None: the cross-entropy is 0.
        teacher_hidden: the teacher's `[N, D]`; None: the KL is 0.
        temperature: tau of the KL, above 0.

    Returns:
        Two fp32 (fp64 for fp64 inputs) scalars, summed over positions, in nats: cross-entropy and
        KL (times tau^2).

    Raises:
        UsageError: if shapes do not fit, the temperature is not above 0, or there are neither
            targets nor a teacher.
    """
    check_arguments(hidden, head, targets, teacher_hidden, temperature)
    arguments = (hidden, head, targets, teacher_hidden)
    form = choose("kl_loss", hidden, fused=hidden.dtype != torch.float64)
    if form == "reference":
        return reference.vocabulary_loss(*arguments, temperature=temperature)
    if form == "torch":
        return chunked.vocabulary_loss(*arguments, temperature=temperature)
    from edgekit.kernels.kl_loss import fused

    return fused.vocabulary_loss(*arguments, temperature=temperature)
