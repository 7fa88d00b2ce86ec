"""The vocabulary's losses by Triton programs and matrix products, with the reference's signature.

Some positions at a time: one product makes the logits of student and teacher, one program for each
position turns them into losses and, in place, into gradients, and one product brings those back to
the hidden states. `README.md` has the maths and what moves through memory.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from edgekit.errors import UsageError
from edgekit.kernels.kl_loss import programs
from edgekit.kernels.kl_loss.reference import IGNORE, check_arguments
from edgekit.kernels.launch import launch
from edgekit.kernels.offline import Build
from edgekit.kernels.precision import full_precision

__all__ = ["builds", "vocabulary_loss"]

# Logits of a row that a program reads at a time, and its warps, by the logits' bytes. Two programs
# of 64 registers a thread then fill a multiprocessor; with fewer warps the compiler puts some sums
# into memory to fit in one program more.
SETTINGS = {2: (2048, 16), 4: (2048, 16)}
COMBINED = (2048, 4)  # the same of `combine`
CACHE = 48 << 20  # bytes of logits at a time: what an H100's L2 holds
# Rows of logits at a time: with fewer, a product waits for the head to be read; more gain nothing.
FEWEST, MOST = 512, 4096
# Cross-entropy, KL, and its temperature, of the builds.
SHIPPED = {
    "ce": (True, False, 1.0),
    "kl": (False, True, 2.0),
    "both": (True, True, 1.0),
    "both, tau": (True, True, 2.0),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def vocabulary_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor | None,
    teacher_hidden: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference; `head` and `teacher_hidden` get no gradient.

    Under autocast the products are in its dtype. No gradient is made where none can be asked for.

    Args:
        hidden: `[N, D]`, 16 or 32 bits wide.
        head: `[V, D]`.
        targets: int64 `[N]` or None; outside the vocabulary, and not `IGNORE`, the loss is NaN.
        teacher_hidden: `[N, D]` or None.
        temperature: tau, above 0.
        rows: positions at a time; None: as many as fit the cache.

    Raises:
        UsageError: for another dtype, or shapes that do not fit.
    """
    check_arguments(hidden, head, targets, teacher_hidden, temperature)
    if hidden.dtype not in DTYPES:
        raise UsageError(f"{hidden.dtype} given; allowed: {', '.join(map(str, DTYPES))}")
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    arguments = (hidden, head, targets, teacher_hidden, temperature, rows, wanted)
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
        rows: int | None,
        wanted: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.asked = targets is not None, teacher_hidden is not None
        ctx.dtype = hidden.dtype
        losses = hidden.new_zeros((2, len(hidden)), dtype=torch.float32)
        inputs = hidden, head, *(() if teacher_hidden is None else (teacher_hidden,))
        student, head, *teacher = _narrowed(*inputs)
        grads = student.new_empty((sum(ctx.asked) if wanted else 0, *student.shape))
        with full_precision(student):  # what autocast would narrow is narrow
            for part in _parts(len(student), rows or _rows(head, 1 + len(teacher))):
                logits = torch.cat([x[part] for x in (student, *teacher)]) @ head.mT
                chosen = None if targets is None else targets[part]
                _make_losses(logits, chosen, losses[:, part], temperature, wanted)
                if wanted:
                    # Without targets the student's logits are still logits.
                    by_logits = logits if targets is not None else logits[len(logits) // 2 :]
                    grads[:, part] = (by_logits @ head).view(len(grads), -1, head.shape[1])
        ctx.save_for_backward(grads)
        ce, kl = losses.sum(dim=1).unbind()
        return ce, kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_ce: torch.Tensor, by_kl: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        result = torch.empty(grads.shape[1:], dtype=ctx.dtype, device=grads.device)
        size, (block, warps) = result.numel(), COMBINED
        if size:
            grid = (triton.cdiv(size, block),)
            sizes = dict(zip(("CE", "KL"), ctx.asked, strict=True), BLOCK=block, num_warps=warps)
            launch(programs.combine, grid, grads, by_ce, by_kl, result, size, **sizes)
        return result, None, None, None, None, None, None


def _make_losses(
    logits: torch.Tensor,
    targets: torch.Tensor | None,
    losses: torch.Tensor,
    temperature: float,
    gradients: bool,
) -> None:
    """Fill `losses`, cross-entropy and KL, fp32 `[2, R]`; and overwrite logits with gradients.

    Args:
        logits: the student's `[R, V]`, or above the teacher's `[2 R, V]`.
        targets: `[R]`; None: no cross-entropy.
        losses: rows of zeros.
        temperature: tau.
        gradients: whether to make them.
    """
    rows = losses.shape[1]
    with_kl, with_ce = len(logits) > rows, targets is not None
    constants = _constants(logits.shape[1], logits.element_size(), with_ce, with_kl, temperature)
    launch(
        programs.loss_rows,
        (rows,),
        logits,
        logits[-rows:],
        logits if targets is None else targets.contiguous(),
        *losses,
        temperature if with_kl else 1.0,
        **constants,
        GRADIENTS=gradients,
        num_warps=SETTINGS[logits.element_size()][1],
    )


def _constants(
    vocabulary: int, itemsize: int, with_ce: bool, with_kl: bool, temperature: float
) -> dict[str, Any]:
    return {
        "V": vocabulary,
        "IGNORE": IGNORE,
        "CE": with_ce,
        "KL": with_kl,
        "APART": with_ce and with_kl and temperature != 1.0,
        "BLOCK": min(SETTINGS[itemsize][0], triton.next_power_of_2(vocabulary)),
    }


def _narrowed(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In autocast's dtype where it is on; once, and not for each product."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]


def _rows(head: torch.Tensor, parts: int) -> int:
    """Positions at a time, each with `parts` rows of logits."""
    held = CACHE // (len(head) * head.element_size())
    return min(max(held, FEWEST), MOST) // parts


def _parts(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def builds() -> tuple[Build, ...]:
    """What is shipped: both losses or one, of SmolLM2's and Llama 3's vocabulary."""
    found = []
    for vocabulary, (dtype, itemsize) in product((49152, 128256), (("bf16", 2), ("fp32", 4))):
        for name, asked in SHIPPED.items():
            constants = _constants(vocabulary, itemsize, *asked)
            found.append(_build(f"{name}, {vocabulary} {dtype}", dtype, itemsize, constants))
    sums = {"CE": True, "KL": True, "BLOCK": COMBINED[0]}
    types = {"grads": "*bf16", "by_ce": "*fp32", "by_kl": "*fp32", "result": "*bf16", "size": "i32"}
    last = Build(
        name="kl_loss combine",
        program=programs.combine,
        types=types,
        constants=sums,
        warps=COMBINED[1],
        tensor_cores=False,
    )
    return (*found, last)


def _build(name: str, dtype: str, itemsize: int, constants: dict[str, Any]) -> Build:
    logits = f"*{dtype}"
    return Build(
        name=f"kl_loss loss_rows, {name}",
        program=programs.loss_rows,
        types={
            "logits": logits,
            "expected": logits,
            "targets": "*i64" if constants["CE"] else logits,
            "ce": "*fp32",
            "kl": "*fp32",
            "temperature": "fp32",
        },
        constants={**constants, "GRADIENTS": True},
        warps=SETTINGS[itemsize][1],
        tensor_cores=False,
    )
