"""`reference.vocabulary_loss`, some rows at a time: the logits of all rows never exist at once.

The gradient with respect to the hidden states is made in the forward pass, where the logits are at
hand, and only scaled in the backward one:

    d ce / d s_n = softmax(s_n) - onehot(target_n)
    d kl / d s_n = tau (softmax(s_n / tau) - softmax(t_n / tau))
"""

from typing import Any

import torch

from edgekit.kernels.kl_loss.reference import IGNORE
from edgekit.kernels.precision import widened

__all__ = ["vocabulary_loss"]

CACHED_ROWS, ROWS = 64, 1024  # of logits at a time: on a CPU, where they must fit its cache; else


def vocabulary_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor | None,
    teacher_hidden: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference; `head` and `teacher_hidden` get no gradient."""
    arguments = (hidden, head, targets, teacher_hidden, temperature)
    ce, kl = _VocabularyLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return ce, kl


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor | None,
        teacher_hidden: torch.Tensor | None,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ce, kl = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        grads = (torch.zeros_like(hidden), torch.zeros_like(hidden))
        step = CACHED_ROWS if hidden.device.type == "cpu" else ROWS
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            logits = widened(hidden[rows] @ head.mT)
            if targets is not None:
                loss, by_logits = _cross_entropy(logits, targets[rows])
                ce, grads[0][rows] = ce + loss, by_logits.to(head.dtype) @ head
            if teacher_hidden is not None:
                expected = widened(teacher_hidden[rows] @ head.mT)
                loss, by_logits = _divergence(logits, expected, temperature)
                kl, grads[1][rows] = kl + loss, by_logits.to(head.dtype) @ head
        ctx.save_for_backward(*grads)
        return ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_ce, by_kl = ctx.saved_tensors
        hidden = widened(by_ce) * grads[0] + widened(by_kl) * grads[1]  # 16 bits round a weight
        return hidden.to(by_ce.dtype), None, None, None, None


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of `[R, V]`, and its gradient."""
    counted = (targets != IGNORE)[:, None]
    chosen = targets.clamp_min(0)[:, None]
    log_p = logits.log_softmax(dim=-1)
    loss = -(log_p.gather(1, chosen) * counted).sum()
    grad = log_p.exp_()
    grad.scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=grad.dtype))
    return loss, grad.mul_(counted)


def _divergence(
    logits: torch.Tensor, expected: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed tau^2 KL(expected || logits) of `[R, V]`, and its gradient; overwrites both."""
    if temperature != 1.0:
        logits, expected = logits.div_(temperature), expected.div_(temperature)
    log_p, log_q = logits.log_softmax(dim=-1), expected.log_softmax(dim=-1)
    q = torch.exp(log_q, out=expected)
    loss = torch.dot(q.flatten(), log_q.sub_(log_p).flatten()) * temperature**2
    return loss, log_p.exp_().sub_(q).mul_(temperature)
