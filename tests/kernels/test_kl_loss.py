"""The chunked vocabulary loss is the plain one, gradient included."""

import pytest
import torch

from edgekit.kernels.kl_loss import chunked, reference
from edgekit.testing import TOLERANCE, assert_close

ROWS, WIDTH, VOCABULARY = 300, 24, 131  # more rows than a chunk, none of them a power of two


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(3)
    hidden, teacher = (torch.randn(rows, WIDTH, generator=random, dtype=dtype) for _ in range(2))
    head = torch.randn(VOCABULARY, WIDTH, generator=random, dtype=dtype)
    targets = torch.randint(VOCABULARY, (rows,), generator=random)
    targets[::3] = reference.IGNORE
    return hidden.requires_grad_(), head, targets, teacher


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("with_teacher", [True, False], ids=["kl", "no teacher"])
@pytest.mark.parametrize("rows", [1, 256, ROWS])
def test_chunked_equals_reference(temperature: float, with_teacher: bool, rows: int) -> None:
    hidden, head, targets, teacher = inputs(torch.float64, rows)
    results = []
    for form in (reference, chunked):
        expected = teacher if with_teacher else None
        ce, kl = form.vocabulary_loss(hidden, head, targets, expected, temperature=temperature)
        (grad,) = torch.autograd.grad(0.3 * ce + 1.7 * kl, hidden)
        results.append((ce, kl, grad))
    for name, expected_value, actual in zip(("ce", "kl", "gradient"), *results, strict=True):
        if expected_value.abs().sum() or actual.abs().sum():
            assert_close(name, expected_value, actual, ratio=TOLERANCE["float64"])


def test_reference_is_the_textbook_sum() -> None:
    hidden, head, targets, teacher = inputs(torch.float64, 5)
    ce, kl = reference.vocabulary_loss(hidden, head, targets, teacher)
    p, q = (hidden @ head.mT).softmax(-1), (teacher @ head.mT).softmax(-1)
    kept = targets != reference.IGNORE
    by_hand = -p[kept, targets[kept]].log().sum()
    assert_close("ce", by_hand, ce, ratio=TOLERANCE["float64"])
    assert_close("kl", (q * (q / p).log()).sum(), kl, ratio=TOLERANCE["float64"])


def test_equal_logits_have_no_divergence_and_no_gradient() -> None:
    hidden, head, targets, _ = inputs(torch.float64)
    _, kl = chunked.vocabulary_loss(hidden, head, targets, hidden.detach())
    (grad,) = torch.autograd.grad(kl, hidden)
    assert kl.abs() < 1e-10
    assert grad.abs().max() < 1e-12


def test_no_row_to_read_gives_zero() -> None:
    hidden, head, targets, _ = inputs(torch.float32)
    ce, kl = chunked.vocabulary_loss(hidden[:0], head, targets[:0])
    (ce + kl).backward()
    assert ce.item() == kl.item() == 0.0
