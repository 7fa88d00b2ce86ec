"""The freezing score against numbers worked out by hand."""

import pytest
import torch

from edgekit.adapters.scores import GradientScore


def score(**options: object) -> GradientScore:
    return GradientScore(**{"beta1": 0.5, "beta2": 0.75, **options})


def test_three_steps_by_hand() -> None:
    # |G| = 4, 2, 6.  M = 2, 2, 4.  U = 2, 0, 2.  V = 0.5, 0.375, 0.78125.
    found = score()
    values = []
    for gradient in (4.0, -2.0, 6.0):
        found.observe(torch.tensor([[gradient]]))
        values.append(found.value)
    assert values == pytest.approx([1.0, 0.75, 3.125])


def test_mean_over_elements_of_the_product() -> None:
    found = score()
    found.observe(torch.tensor([4.0, 0.0]))
    assert found.value == pytest.approx(0.5)  # (2 * 0.5 + 0) / 2
    assert found.elements.tolist() == pytest.approx([1.0, 0.0])


def test_window_counts_the_mean_of_the_one_before() -> None:
    # Windows of two steps: |G| = 1 3 | 5 7 | 9. Pushed: 0, then 2, then 6.
    windowed, plain = score(cadence="window", window=2), score()
    for gradient in (1.0, 3.0, 5.0, 7.0, 9.0):
        windowed.observe(torch.tensor([gradient]))
    for mean in (0.0, 2.0, 6.0):
        plain.observe(torch.tensor([mean]))
    assert windowed.value == pytest.approx(plain.value)


def test_nothing_seen_is_zero_and_holds_nothing() -> None:
    assert score().value == 0.0
    assert score().elements.numel() == 0


@pytest.mark.parametrize("cadence", ["step", "window"])
def test_goes_on_from_what_it_saved(cadence: str) -> None:
    random = torch.Generator().manual_seed(1)
    gradients = torch.randn(9, 3, 5, generator=random)
    whole, first, second = (score(cadence=cadence, window=4) for _ in range(3))
    for number, gradient in enumerate(gradients):
        whole.observe(gradient)
        (first if number < 6 else second).observe(gradient)
        if number == 5:
            second.load(first.tensors())
    assert second.value == whole.value
    assert whole.nbytes > 2 * gradients[0].nbytes - 1
