"""Attention with image mass: what the mass is, and that the fast forms are the reference."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is made for Linux on x86-64")

from edgekit.errors import UsageError
from edgekit.kernels.dispatch import forced
from edgekit.kernels.spin_attention import column, fused, reference, spin_attention
from edgekit.testing import TOLERANCE, assert_close

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interp),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
ONE, SEVERAL = ((10, 40),), ((0, 3), (30, 41), (64, 65), (100, 120))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a call; `images` are ranges of keys, `padding` is on the left of each row."""

    time: int = 130
    past: int = 0
    heads: int = 2
    groups: int = 1
    width: int = 24
    images: tuple[tuple[int, int], ...] = ONE
    padding: tuple[int, ...] | None = None
    window: int | None = None
    scale: float | None = None
    parts: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def batch(self) -> int:
        return 1 if self.padding is None else len(self.padding)

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and where images are, on the CPU; keys are sharp enough to be told apart."""
        random = torch.Generator().manual_seed(self.time)
        keys = (self.batch, self.past + self.time, self.groups, self.width)
        q = torch.randn(self.batch, self.time, self.heads, self.width, generator=random)
        k, v = (torch.randn(keys, generator=random) for _ in range(2))
        image = torch.zeros(keys[:2], dtype=torch.bool)
        for i, (start, end) in enumerate(self.images):
            image[i % self.batch :, start:end] = True  # rows differ
        return [*(x.to(self.dtype) for x in (1.5 * q, k, v)), image]

    def options(self, device: str) -> dict[str, Any]:
        mask = None
        if self.padding is not None:
            columns = torch.arange(self.past + self.time, device=device)
            mask = columns >= torch.tensor(self.padding, device=device)[:, None]
        return {"mask": mask, "scale": self.scale, "past": self.past, "window": self.window}


def results(form, case: Case, dtype: torch.dtype, device: str, **more) -> list[torch.Tensor]:
    *inputs, image = (x.to(device) for x in case.inputs())
    output, mass = form(*(x.to(dtype) for x in inputs), image, **case.options(device), **more)
    assert output.dtype == dtype
    assert mass.dtype == torch.promote_types(dtype, torch.float32)
    return [output.cpu(), mass.cpu()]


def check(form, case: Case, dtype: torch.dtype, device: str, **more) -> None:
    expected = results(reference.spin_attention, case, torch.float64, "cpu")
    actual = results(form, case, dtype, device, **more)
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    for name, wanted, found in zip(("output", "mass"), expected, actual, strict=True):
        assert wanted.shape == found.shape
        assert found.isfinite().all(), name
        if wanted.any():
            assert_close(name, wanted, found, ratio=tolerance)
        else:
            assert not found.any(), name


CASES = {
    **{f"T {t}": Case(time=t, images=((0, 1), (2, 50))) for t in (1, 2, 3, 63, 130)},
    "one token after others": Case(time=1, past=129, groups=2, heads=6, width=64),
    "one token, in parts": Case(time=1, past=299, groups=2, heads=6, parts=3, images=SEVERAL),
    "more parts than blocks": Case(time=2, past=61, parts=5),
    "one token, padded, in parts": Case(time=1, past=259, padding=(150, 0, 260), parts=3),
    "some tokens after others": Case(time=33, past=97, images=SEVERAL),
    "own keys": Case(heads=3, groups=3, time=70),
    "groups of three": Case(heads=6, groups=2, images=SEVERAL),
    "width 64": Case(width=64, time=70),
    "width 128": Case(width=128, time=70),
    "width 100": Case(width=100, time=40),
    "width 256": Case(width=256, time=33, images=((3, 9),)),
    "no image": Case(images=()),
    "several images": Case(images=SEVERAL),
    "an image at the end": Case(images=((125, 130),)),
    "nothing but images": Case(images=((0, 130),)),
    "padding": Case(padding=(0, 7, 70), images=SEVERAL),
    "padding after others": Case(padding=(0, 80), past=65, time=9, images=SEVERAL),
    "window": Case(window=20, images=SEVERAL),
    "window of one": Case(window=1, time=70),
    "window wider than all": Case(window=500, time=70),
    "window and padding": Case(window=70, padding=(5, 60), images=SEVERAL),
    "window after others": Case(window=48, past=100, time=30, images=SEVERAL),
    "one token, window": Case(window=48, past=129, time=1, parts=2, images=SEVERAL),
    "scale": Case(scale=0.5, time=70),
}
NARROW = {
    "fp16": Case(dtype=torch.float16, time=70, width=64),
    "bf16": Case(dtype=torch.bfloat16, time=70, width=64, heads=3),
    "bf16, one token": Case(dtype=torch.bfloat16, time=1, past=99, width=64, heads=3, parts=2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [*CASES.values(), *NARROW.values()], ids=[*CASES, *NARROW])
def test_fused_equals_reference(case: Case, device: str) -> None:
    check(fused.spin_attention, case, case.dtype, device, parts=case.parts)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_column_equals_reference(case: Case) -> None:
    check(column.spin_attention, case, torch.float64, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES.values(), *NARROW.values()], ids=[*CASES, *NARROW])
def test_column_equals_reference_on_a_gpu(case: Case) -> None:
    check(column.spin_attention, case, case.dtype, "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_large_logits_stay_finite(device: str) -> None:
    check(fused.spin_attention, Case(scale=40.0, time=70), torch.float32, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["cache", "one column more"])
def test_views_are_read_as_what_they_show(layout: str, device: str) -> None:
    case = Case(time=20, past=50, heads=4, groups=2)
    q, k, v, image = (x.to(device) for x in case.inputs())
    wanted = fused.spin_attention(q, k, v, image, past=50)
    if layout == "cache":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    else:
        v = torch.cat((v, v), dim=3)[..., : case.width]
        k = functional.pad(k, (0, 1))[..., : case.width]
    found = fused.spin_attention(q, k, v, image, past=50)
    assert all(torch.equal(x, y) for x, y in zip(wanted, found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_no_token_gives_nothing(device: str) -> None:
    q, k, v, image = (x.to(device) for x in Case(time=5).inputs())
    output, mass = fused.spin_attention(q[:, :0], k, v, image, past=5)
    assert output.shape == (1, 0, 2, 24)
    assert mass.shape == (1, 0, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_the_triton_form_has_no_gradient(device: str) -> None:
    q, k, v, image = (x.to(device) for x in Case(time=5).inputs())
    with pytest.raises(UsageError, match="a gradient is asked for"):
        fused.spin_attention(q.requires_grad_(), k, v, image)
    with torch.no_grad():
        assert fused.spin_attention(q, k, v, image)[1].shape == (1, 5, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_the_public_function_takes_the_form_that_is_forced(device: str) -> None:
    case = Case(time=20, window=7)
    with forced("triton"):
        chosen = results(spin_attention, case, torch.float32, device)
    direct = results(fused.spin_attention, case, torch.float32, device)
    assert all(torch.equal(x, y) for x, y in zip(chosen, direct, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_64_bits_and_wide_heads_are_refused(device: str) -> None:
    q, k, v, image = (x.to(device) for x in Case(time=5, width=264).inputs())
    for wrong in ((q, k, v), (x[..., :16].double() for x in (q, k, v))):
        with pytest.raises(UsageError, match="256 wide at most"):
            fused.spin_attention(*wrong, image)


def test_output_is_attention() -> None:
    case = Case(heads=6, groups=2, images=SEVERAL)
    output, _ = results(reference.spin_attention, case, torch.float64, "cpu")
    q, k, v = (x.double().transpose(1, 2) for x in case.inputs()[:3])
    wanted = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close("output", wanted.transpose(1, 2), output, ratio=TOLERANCE["float64"])


def test_mass_is_attention_to_the_indicator() -> None:
    case = Case(heads=6, groups=2, images=SEVERAL)
    q, k, v, image = case.inputs()
    marked = image[:, :, None, None].expand_as(v).double()
    shown, mass = reference.spin_attention(q.double(), k.double(), marked, image)
    assert_close("mass", shown[..., 0], mass, ratio=TOLERANCE["float64"])


def test_masses_of_several_images_add_up() -> None:
    q, k, v, image = Case(images=SEVERAL).inputs()
    _, whole = reference.spin_attention(q, k, v, image)
    each = []
    for start, end in SEVERAL:
        one = torch.zeros_like(image)
        one[:, start:end] = True
        each.append(reference.spin_attention(q, k, v, one)[1])
    assert_close("mass", sum(each), whole, ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("form", [reference, column], ids=["reference", "torch"])
def test_mass_of_nothing_and_of_everything(form) -> None:
    q, k, v, image = Case(time=9).inputs()
    assert not form.spin_attention(q, k, v, torch.zeros_like(image))[1].any()
    _, all_mass = form.spin_attention(q, k, v, torch.ones_like(image))
    assert_close("mass", torch.ones_like(all_mass), all_mass, ratio=TOLERANCE["float32"])


def test_a_token_is_the_last_of_the_whole_text() -> None:
    q, k, v, image = Case(images=SEVERAL, window=33).inputs()
    whole = reference.spin_attention(q, k, v, image, window=33)
    step = reference.spin_attention(q[:, -1:], k, v, image, past=129, window=33)
    for name, x, y in zip(("output", "mass"), whole, step, strict=True):
        assert_close(name, x[:, -1:], y, ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("form", [reference, column], ids=["reference", "torch"])
def test_padding_changes_no_token_and_sees_nothing(form) -> None:
    case = Case(padding=(30,), images=((0, 10), (40, 60)))
    q, k, v, image = case.inputs()
    output, mass = form.spin_attention(q, k, v, image, **case.options("cpu"))
    alone = form.spin_attention(*(x[:, 30:] for x in (q, k, v, image)))
    assert not output[:, :30].any()
    assert not mass[:, :30].any()
    assert_close("output", alone[0], output[:, 30:], ratio=TOLERANCE["float32"])
    assert_close("mass", alone[1], mass[:, 30:], ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("padding", [None, (0, 7)])
def test_gradients_of_the_torch_form_are_those_of_the_reference(padding) -> None:
    case = Case(time=20, heads=4, groups=2, padding=padding)
    grads = []
    for form in (reference, column):
        *inputs, image = case.inputs()
        leaves = [x.double().requires_grad_() for x in inputs]
        output, mass = form.spin_attention(*leaves, image, **case.options("cpu"))
        grads.append(torch.autograd.grad(output.square().sum() + mass.square().sum(), leaves))
    for name, wanted, found in zip("qkv", *grads, strict=True):
        assert_close(f"d{name}", wanted, found, ratio=TOLERANCE["float64"])


def test_reference_has_the_right_gradient() -> None:
    *inputs, image = Case(time=4, width=3, heads=2).inputs()
    leaves = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: reference.spin_attention(*x, image), leaves)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_forms_without_triton_agree(form: str) -> None:
    case = Case(padding=(0, 7), images=SEVERAL, heads=4, groups=2)
    with forced(form):
        check(spin_attention, case, torch.float64, "cpu")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"past": 1}, "k and v of"),
        ({"image": torch.zeros(1, 4, dtype=torch.bool)}, "one flag for each key"),
        ({"mask": torch.ones(2, 5)}, "one flag for each key"),
        ({"scale": 0.0}, "above 0, or None"),
        ({"window": 0}, "above 0, or None"),
        ({"q": torch.zeros(1, 5, 3, 24)}, "a divisor of 3"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], message: str) -> None:
    q, k, v, image = Case(time=5, groups=2).inputs()
    given = {"q": q, "k": k, "v": v, "image": image} | wrong
    with pytest.raises(UsageError, match=message):
        spin_attention(**given)
