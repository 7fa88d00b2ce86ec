"""The Triton form of convolution and feature map equals the definition, gradients included."""

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux on x86-64")

from edgekit.errors import UsageError
from edgekit.kernels.conv_feature import fused, reference
from edgekit.testing import TOLERANCE, assert_close

pytestmark = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interp),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
NAMES = ("x", "taps", "weight", "tail")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    batch: int = 2
    time: int = 130
    heads: int = 2
    width: int = 12
    columns: int = 6
    taps: int = 4
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = ()
    scale: float = 1.0  # of the matrix

    def inputs(self, device: str) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(5)
        count, channels = len(self.lengths) or self.batch, self.heads * self.width
        shapes = (
            (self.batch, self.time, self.heads, self.width),
            (channels, self.taps),
            (self.heads, self.width, self.columns),
            (count, channels, self.taps - 1),
        )
        factors = (1.0, self.taps**-0.5, self.scale * self.width**-0.5, 1.0)
        values = (
            torch.randn(s, generator=random) * f for s, f in zip(shapes, factors, strict=True)
        )
        x, *others = values
        return dict(zip(NAMES, (x.to(self.dtype), *others), strict=True))

    def borders(self) -> torch.Tensor | None:
        return torch.tensor((0, *self.lengths)).cumsum(0) if self.lengths else None


def results(
    op: Any,
    tensors: dict[str, torch.Tensor],
    learned: tuple[str, ...],
    through: tuple[float, float],
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Outputs of `op`, and the gradients of `learned` through phi and through the tail."""
    given = {n: t.clone().requires_grad_(n in learned) for n, t in tensors.items()}
    phi, after = op(**given, **options)
    random = torch.Generator().manual_seed(6)
    loss = 0.0
    for factor, output in zip(through, (phi, after), strict=True):
        direction = torch.randn(output.shape, generator=random).to(output)
        if factor:
            loss = loss + factor * (output * direction).sum()
    gradients = torch.autograd.grad(loss, [given[n] for n in learned])
    named = {f"gradient of {n}": g for n, g in zip(learned, gradients, strict=True)}
    return {"phi": phi, "after": after} | named


def compare(
    case: Case,
    device: str,
    *,
    mask: torch.Tensor | None = None,
    learned: tuple[str, ...] = NAMES,
    through: tuple[float, float] = (1.0, 1.0),
    without: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    tensors = {n: t for n, t in case.inputs(device).items() if n not in without}
    learned = tuple(n for n in learned if n not in without)
    double = {n: t.double() for n, t in tensors.items()}
    there = {n: t.to(device) for n, t in tensors.items()}
    cu_seqlens = case.borders()
    expected = results(
        reference.conv_feature, double, learned, through, mask=mask, cu_seqlens=cu_seqlens
    )
    moved = {"mask": mask, "cu_seqlens": cu_seqlens}
    moved = {n: t if t is None else t.to(device) for n, t in moved.items()}
    actual = results(fused.conv_feature, there, learned, through, **moved)
    ratio = TOLERANCE[str(case.dtype).removeprefix("torch.")]
    for name, value in expected.items():
        assert_close(name, value, actual[name], ratio=ratio)
    return actual


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few tokens are many chunks."""
    small = {
        key: dataclasses.replace(setting, tokens=32, tiles=2)
        for key, setting in fused.SETTINGS.items()
    }
    monkeypatch.setattr(fused, "SETTINGS", small)


@pytest.mark.parametrize("time", [1, 2, 3, 63, 130], ids=lambda t: f"T{t}")
def test_batch(time: int, device: str) -> None:
    compare(Case(time=time), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "columns"), [(64, 32), (80, 40)], ids=str)
def test_real_heads(width: int, columns: int, dtype: torch.dtype, device: str) -> None:
    compare(Case(batch=1, time=70, width=width, columns=columns, dtype=dtype), device)


@pytest.mark.parametrize("taps", [1, 2, 5], ids=lambda k: f"K{k}")
def test_other_taps(taps: int, device: str) -> None:
    compare(Case(batch=1, time=40, taps=taps), device)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows(dtype: torch.dtype, device: str) -> None:
    lengths = (1, 75, 2, 0, 33, 3)
    compare(Case(batch=1, time=sum(lengths), lengths=lengths, dtype=dtype), device)


@pytest.mark.usefixtures("small_tiles")
def test_many_chunks_of_a_long_row(device: str) -> None:
    compare(Case(batch=1, time=161, heads=1), device)


def test_padding_after_the_last_token(device: str) -> None:
    mask = torch.ones(3, 40)
    mask[0, 2:], mask[1, 37:] = 0, 0
    compare(Case(batch=3, time=40), device, mask=mask)


def test_padding_before_the_first_token(device: str) -> None:
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :38], mask[1, :1], mask[2] = False, False, False
    compare(Case(batch=3, time=40), device, mask=mask, without=("tail",))


@pytest.mark.parametrize("learned", [("taps",), ("weight",), ("x",), ("tail",)], ids=str)
def test_the_rest_is_frozen(learned: tuple[str, ...], device: str) -> None:
    compare(Case(batch=1, time=20), device, learned=learned)


@pytest.mark.parametrize("through", [(1.0, 0.0), (0.0, 1.0)], ids=["phi", "tail"])
def test_gradient_arrives_through_one_output(through: tuple[float, float], device: str) -> None:
    learned = NAMES if through[0] else ("x", "tail")
    compare(Case(batch=1, time=20), device, learned=learned, through=through)


def test_no_gradient_where_the_floor_holds(device: str) -> None:
    actual = compare(Case(batch=1, time=40, scale=20.0), device)
    assert (actual["phi"] == reference.FEATURE_FLOOR).float().mean() > 0.2


def test_features_in_bf16(device: str) -> None:
    case = Case(batch=1, time=20)
    tensors = {n: t.to(device) for n, t in case.inputs(device).items()}
    expected, _ = reference.conv_feature(**{n: t.double() for n, t in tensors.items()})
    phi, _ = fused.conv_feature(**tensors, dtype=torch.bfloat16)
    assert phi.dtype == torch.bfloat16
    assert_close("phi", expected, phi, ratio=TOLERANCE["bfloat16"])


def test_declines_what_only_other_forms_do(device: str) -> None:
    tensors = {n: t.to(device) for n, t in Case(time=3).inputs(device).items()}
    with pytest.raises(UsageError, match="float64"):
        fused.conv_feature(**{n: t.double() for n, t in tensors.items()})
    wide = {n: t.to(device) for n, t in Case(time=3, columns=130).inputs(device).items()}
    with pytest.raises(UsageError, match="130"):
        fused.conv_feature(**wide)
