"""The Triton form of the vocabulary's losses is the reference, gradients included."""

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux on x86-64")

from edgekit.errors import UsageError
from edgekit.kernels.dispatch import forced
from edgekit.kernels.kl_loss import IGNORE, chunked, fused, reference, vocabulary_loss
from edgekit.testing import TOLERANCE, assert_close

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interp),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
NAMES = ("ce", "kl", "gradient by ce", "gradient by kl", "gradient")
WEIGHTS = (0.3, 1.7)  # of ce and kl, in "gradient"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a call; `sharp` is about the deviation of a logit."""

    rows: int = 7
    vocabulary: int = 131
    width: int = 24
    targets: bool = True
    ignored: bool = True
    teacher: bool = True
    temperature: float = 1.0
    sharp: float = 4.0
    step: int | None = None
    dtype: torch.dtype = torch.float32

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Hidden states, head, targets and the teacher's states, on the CPU."""
        random = torch.Generator().manual_seed(self.rows)
        rows = (self.rows, self.width)
        hidden, teacher = (torch.randn(rows, generator=random).to(self.dtype) for _ in range(2))
        head = torch.randn(self.vocabulary, self.width, generator=random)
        head = (head * self.sharp / self.width**0.5).to(self.dtype)
        targets = torch.randint(self.vocabulary, (self.rows,), generator=random)
        targets[-1] = self.vocabulary - 1  # in the block that the vocabulary does not fill
        if self.ignored:
            targets[::3] = IGNORE
        return hidden, head, targets if self.targets else None, teacher if self.teacher else None


def results(form, case: Case, dtype: torch.dtype, device: str, **options) -> list[torch.Tensor]:
    hidden, head, targets, teacher = (None if x is None else x.to(device) for x in case.inputs())
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype)
    teacher = None if teacher is None else teacher.to(dtype)
    ce, kl = form(hidden, head, targets, teacher, temperature=case.temperature, **options)
    found = [ce, kl]
    for weights in ((1.0, 0.0), (0.0, 1.0), WEIGHTS):
        total = weights[0] * ce + weights[1] * kl
        (grad,) = torch.autograd.grad(total, hidden, retain_graph=True)
        found.append(grad)
    assert ce.dtype == kl.dtype == torch.promote_types(dtype, torch.float32)
    return [x.detach().cpu() for x in found]


def check(case: Case, device: str) -> None:
    expected = results(reference.vocabulary_loss, case, torch.float64, "cpu")
    actual = results(fused.vocabulary_loss, case, case.dtype, device, rows=case.step)
    tolerance = TOLERANCE[str(case.dtype).removeprefix("torch.")]
    for name, wanted, found in zip(NAMES, expected, actual, strict=True):
        assert found.isfinite().all(), name
        if wanted.any():
            assert_close(name, wanted, found, ratio=tolerance)
        else:
            assert not found.any(), name


CASES = {
    **{f"{n} rows": Case(rows=n) for n in (1, 2, 3, 63)},
    "rows that fill no chunk": Case(rows=130, step=48),
    "one row at a time": Case(step=1),
    "temperature": Case(temperature=2.5),
    "low temperature": Case(temperature=0.5, sharp=10),
    "without a teacher": Case(teacher=False, step=3),
    "without targets": Case(targets=False, step=3),
    "without targets, temperature": Case(targets=False, temperature=2.5),
    "without a teacher, temperature": Case(teacher=False, temperature=2.5),
    "no target ignored": Case(ignored=False),
    "sharp": Case(sharp=40.0),
    "one token": Case(vocabulary=1, rows=2, ignored=False),
    "two tokens": Case(vocabulary=2),
    "a block and one": Case(vocabulary=4097, rows=3, temperature=2.0),
    "fp16": Case(dtype=torch.float16, sharp=2.0),
    "bf16": Case(dtype=torch.bfloat16, sharp=2.0, rows=20),
    "bf16, temperature": Case(dtype=torch.bfloat16, sharp=2.0, temperature=2.5, rows=20),
    "SmolLM2": Case(vocabulary=49152, rows=2, width=16, ignored=False),
    "Llama 3": Case(vocabulary=128256, rows=2, width=16, temperature=2.0, ignored=False),
    "bf16, SmolLM2": Case(vocabulary=49152, rows=2, width=16, sharp=2.0, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_equals_reference(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("device", DEVICES)
def test_every_target_ignored(device: str) -> None:
    hidden, head, _, teacher = (None if x is None else x.to(device) for x in Case().inputs())
    targets = torch.full((len(hidden),), IGNORE, device=device)
    ce, kl = fused.vocabulary_loss(hidden.requires_grad_(), head, targets, teacher)
    (grad,) = torch.autograd.grad(ce, hidden)
    assert ce.item() == 0.0
    assert kl.item() > 0.0
    assert not grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_equal_logits_have_no_divergence_and_no_gradient(device: str) -> None:
    hidden, head, targets, _ = (None if x is None else x.to(device) for x in Case().inputs())
    _, kl = fused.vocabulary_loss(hidden.requires_grad_(), head, targets, hidden.detach())
    (grad,) = torch.autograd.grad(kl, hidden)
    assert kl.abs() < 1e-5
    assert grad.abs().max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher", [True, False])
def test_no_row_to_read_gives_zero(teacher: bool, device: str) -> None:
    hidden, head, targets, expected = (x.to(device) for x in Case().inputs())
    hidden = hidden[:0].requires_grad_()
    ce, kl = fused.vocabulary_loss(hidden, head, targets[:0], expected[:0] if teacher else None)
    (ce + kl).backward()
    assert ce.item() == kl.item() == 0.0
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_is_not_rounded_to_the_dtype_of_hidden(device: str) -> None:
    case = Case(dtype=torch.float16, rows=63, sharp=2.0)
    hidden, head, targets, teacher = (x.to(device) for x in case.inputs())
    ce, kl = fused.vocabulary_loss(hidden.requires_grad_(), head, targets, teacher)
    weight = 1 + 2**-11  # 1 in fp16
    once, scaled = (
        torch.autograd.grad(w * (ce + kl), hidden, retain_graph=True)[0].double()
        for w in (1.0, weight)
    )
    assert ((once * scaled).sum() / once.square().sum()).item() == pytest.approx(weight, abs=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_without_gradients_losses_are_the_same(device: str) -> None:
    hidden, head, targets, teacher = (x.to(device) for x in Case().inputs())
    with torch.no_grad():
        plain = fused.vocabulary_loss(hidden, head, targets, teacher)
    trained = fused.vocabulary_loss(hidden.requires_grad_(), head, targets, teacher)
    assert torch.equal(torch.stack(plain), torch.stack(trained))
    assert not plain[0].requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_again(device: str) -> None:
    first, second = (
        results(fused.vocabulary_loss, Case(rows=30, step=8), torch.float32, device)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_makes_the_logits_narrow(device: str) -> None:
    case = Case(rows=20, sharp=2.0)
    with torch.autocast(device, torch.bfloat16):
        actual = results(fused.vocabulary_loss, case, torch.float32, device)
    expected = results(reference.vocabulary_loss, case, torch.float64, "cpu")
    for name, wanted, found in zip(NAMES, expected, actual, strict=True):
        assert_close(name, wanted, found, ratio=TOLERANCE["bfloat16"])


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_read_as_what_they_show(device: str) -> None:
    case = Case(rows=12)
    hidden, head, targets, teacher = (x.to(device) for x in case.inputs())
    wide = torch.stack((hidden, hidden), dim=1).requires_grad_()
    every = torch.stack((targets, targets), dim=1)
    ce, kl = fused.vocabulary_loss(wide[:, 1], head.mT.contiguous().mT, every[:, 1], teacher)
    (grad,) = torch.autograd.grad(ce + kl, wide)
    again = hidden.detach().requires_grad_()
    wanted = fused.vocabulary_loss(again, head, targets, teacher)
    (by_hidden,) = torch.autograd.grad(sum(wanted), again)
    assert_close("losses", torch.stack(wanted), torch.stack((ce, kl)), ratio=1e-6)
    assert_close("gradient", by_hidden, grad[:, 1], ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("device", DEVICES)
def test_a_target_outside_the_vocabulary_shows(device: str) -> None:
    hidden, head, targets, _ = (x.to(device) for x in Case().inputs())
    targets[1] = len(head)
    ce, _ = fused.vocabulary_loss(hidden, head, targets)
    assert ce.isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_shows(device: str) -> None:
    hidden, head, targets, teacher = (x.to(device) for x in Case(ignored=False).inputs())
    hidden[2, 3] = float("nan")
    ce, kl = fused.vocabulary_loss(hidden, head, targets, teacher)
    assert ce.isnan()
    assert kl.isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_the_public_function_takes_the_form_that_is_forced(device: str) -> None:
    hidden, head, targets, teacher = (x.to(device) for x in Case().inputs())
    with forced("triton"):
        chosen = vocabulary_loss(hidden, head, targets, teacher, temperature=2.0)
    direct = fused.vocabulary_loss(hidden, head, targets, teacher, temperature=2.0)
    assert torch.equal(torch.stack(chosen), torch.stack(direct))


@pytest.mark.parametrize("device", DEVICES)
def test_64_bits_are_refused(device: str) -> None:
    hidden, head, targets, _ = (x.to(device) for x in Case().inputs())
    with pytest.raises(UsageError, match=r"torch\.float64 given; allowed"):
        fused.vocabulary_loss(hidden.double(), head.double(), targets)


@pytest.mark.parametrize("form", [reference, chunked], ids=["reference", "torch"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_plain_forms_without_targets(form, temperature: float) -> None:
    case = Case(rows=70, temperature=temperature)
    hidden, head, targets, teacher = case.inputs()
    hidden.requires_grad_()
    expected = form.vocabulary_loss(hidden, head, targets, teacher, temperature=temperature)
    alone = form.vocabulary_loss(hidden, head, None, teacher, temperature=temperature)
    grads = [torch.autograd.grad(kl, hidden)[0] for kl in (expected[1], alone[1])]
    assert alone[0].item() == 0.0
    assert torch.equal(alone[1], expected[1])
    assert torch.equal(*grads)


@pytest.mark.parametrize("with_teacher", [True, False], ids=["kl", "no teacher"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_reference_has_the_right_gradient(temperature: float, with_teacher: bool) -> None:
    random = torch.Generator().manual_seed(5)
    hidden, teacher = (torch.randn(4, 3, generator=random).double() for _ in range(2))
    head, targets = torch.randn(5, 3, generator=random).double(), torch.tensor([1, IGNORE, 4, 0])

    def losses(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expected = teacher if with_teacher else None
        return reference.vocabulary_loss(x, head, targets, expected, temperature=temperature)

    assert torch.autograd.gradcheck(losses, hidden.requires_grad_())


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_forms_without_triton_agree(form: str) -> None:
    case = Case(rows=70, temperature=2.5)
    with forced(form):
        actual = results(vocabulary_loss, case, torch.float64, "cpu")
    expected = results(reference.vocabulary_loss, case, torch.float64, "cpu")
    for name, wanted, found in zip(NAMES, expected, actual, strict=True):
        assert_close(name, wanted, found, ratio=TOLERANCE["float64"])


def test_a_weight_of_16_bits_is_not_rounded_in_plain_pytorch() -> None:
    hidden, head, targets, _ = Case(dtype=torch.bfloat16, rows=63, sharp=2.0).inputs()
    ce, _ = chunked.vocabulary_loss(hidden.requires_grad_(), head, targets)
    weight = 1 / 3  # 0.33398 in bf16
    once, scaled = (
        torch.autograd.grad(w * ce, hidden, retain_graph=True)[0].double() for w in (1.0, weight)
    )
    assert ((once * scaled).sum() / once.square().sum()).item() == pytest.approx(weight, abs=2e-4)


def test_a_loss_of_nothing_is_refused() -> None:
    hidden, head, _, _ = Case().inputs()
    with pytest.raises(UsageError, match="neither targets nor a teacher"):
        vocabulary_loss(hidden, head, None)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    hidden, head, targets, _ = Case().inputs()
    with pytest.raises(UsageError, match="allowed: above 0"):
        vocabulary_loss(hidden, head, targets, temperature=temperature)
