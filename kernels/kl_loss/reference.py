"""Cross-entropy with the next token and KL to a teacher, from hidden states and a frozen head.

With s and t the logits of student and teacher, divided by the temperature tau for the KL:

    loss = ce sum_n -log softmax(s_n)[target_n]  +  kl tau^2 sum_n KL(softmax(t_n) || softmax(s_n))

Sums, not means: the caller divides by counts that may span processes. Hinton et al., arXiv
1503.02531, for the factor tau^2.
"""

import torch
from torch.nn import functional

from edgekit.errors import UsageError
from edgekit.kernels.precision import widened

__all__ = ["IGNORE", "check_arguments", "vocabulary_loss"]

IGNORE = -100  # target of a position that predicts nothing


def vocabulary_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor | None,
    teacher_hidden: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy and summed KL, all logits at once.

    Args:
        hidden: the student's last hidden states `[N, D]`.
        head: `[V, D]`, frozen.
        targets: token to predict at each position, int64 `[N]`; `IGNORE` counts in the KL only.
            None: the cross-entropy is 0.
        teacher_hidden: the teacher's `[N, D]`; None: the KL is 0.
        temperature: tau.

    Returns:
        Two fp32 (fp64 for fp64 inputs) scalars, in nats: cross-entropy and KL (times tau^2).
    """
    logits = widened(hidden @ head.mT)
    ce = logits.new_zeros(())
    if targets is not None:
        ce = functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    if teacher_hidden is None:
        return ce, ce.new_zeros(())
    expected = (widened(teacher_hidden @ head.mT) / temperature).log_softmax(dim=-1)
    actual = (logits / temperature).log_softmax(dim=-1)
    kl = functional.kl_div(actual, expected, log_target=True, reduction="sum")
    return ce, kl * temperature**2


def check_arguments(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor | None,
    teacher_hidden: torch.Tensor | None,
    temperature: float,
) -> None:
    """Check what `vocabulary_loss` was given.

    Raises:
        UsageError: if shapes do not fit, the temperature is not above 0, or there are neither
            targets nor a teacher.
    """
    if temperature <= 0:
        raise UsageError(f"temperature {temperature} given; allowed: above 0")
    if targets is None and teacher_hidden is None:
        raise UsageError("neither targets nor a teacher's states given; a loss needs one of them")
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise UsageError(
            f"hidden {list(hidden.shape)} and head {list(head.shape)} given; allowed: [N, D] and "
            "[V, D]"
        )
    for name, given, wanted in (
        ("targets", targets, hidden.shape[:1]),
        ("teacher_hidden", teacher_hidden, hidden.shape),
    ):
        if given is not None and given.shape != wanted:
            raise UsageError(f"{name} {list(given.shape)} given; allowed: {list(wanted)}")
