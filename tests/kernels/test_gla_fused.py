"""The Triton form of gated linear attention is the recurrence, gradients included."""

from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux on x86-64")

from triton.runtime.interpreter import InterpreterBuilder

from edgekit.errors import UsageError
from edgekit.kernels.gla.fused import Passes, fused_gla
from edgekit.kernels.gla.reference import parallel_gla
from edgekit.testing import TOLERANCE, assert_close

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interp),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Above the diagonal a product may overflow; nobody reads it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
NAMES = ("output", "state", "dq", "dk", "dv", "dg", "dstate")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a call.

    `gate` is the smallest log decay, or all of them where they are `constant`; `size` the largest
    entry of q and k, `large` that of v, `upstream` the size of the output's gradients, `onward`
    that of the last state's, and the first `padding` tokens are padding. Errors may be `loose`
    times the tolerance.
    """

    batch: int = 1
    time: int = 130
    heads: int = 2
    states: int = 1
    features: int = 16
    values: int = 24
    gates: int = 16
    gate: float = -0.4
    chunk: int = 64
    normalise: bool = True
    cu_seqlens: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    gate_dtype: torch.dtype | None = None
    constant: bool = False
    size: float = 1.0
    large: float = 0.5
    upstream: float = 1.0
    onward: float = 1.0
    padding: int = 0
    loose: float = 1.0
    passes: Passes = "two"

    def inputs(self) -> list[torch.Tensor]:
        """Leaves in `dtype`, the state in fp32 as small as q and k; on the CPU."""
        random = torch.Generator().manual_seed(self.time)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=random)

        rows = (self.batch, self.time)
        sequences = self.batch if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        q = drawn(*rows, self.heads, self.features) * self.size
        k = drawn(*rows, self.states, self.features) * self.size
        v = (2 * drawn(*rows, self.states, self.values) - 1) * self.large
        g = drawn(*rows, self.states, self.gates)
        g = (torch.ones_like(g) if self.constant else g) * self.gate
        state = drawn(sequences, self.states, self.features, self.values + 1) * self.size
        k[:, : self.padding] = g[:, : self.padding] = 0.0
        return [*(x.to(self.dtype) for x in (q, k, v)), g.to(self.gate_dtype or self.dtype), state]


def results(form, case: Case, dtype: torch.dtype, device: str, **options) -> list[torch.Tensor]:
    """Output, state and the gradients of both, of inputs that were rounded to the case's dtype."""
    exact = dtype == torch.float64
    leaves = [x.to(device, dtype if exact else x.dtype).requires_grad_() for x in case.inputs()]
    packed = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, device=device)
    output, state = form(*leaves, eps=1e-6, normalise=case.normalise, cu_seqlens=packed, **options)
    random = torch.Generator().manual_seed(1)
    by_output = torch.randn(output.shape, generator=random).to(output) * case.upstream
    by_state = torch.randn(state.shape, generator=random).to(state) * case.onward
    grads = torch.autograd.grad((output, state), leaves, (by_output, by_state))
    return [x.detach().cpu() for x in (output, state, *grads)]


def check(case: Case, device: str) -> None:
    expected = results(parallel_gla, case, torch.float64, "cpu")
    actual = results(fused_gla, case, case.dtype, device, chunk=case.chunk, passes=case.passes)
    tolerance = case.loose * TOLERANCE[str(case.dtype).removeprefix("torch.")]
    for name, wanted, found in zip(NAMES, expected, actual, strict=True):
        # What fp32 cannot hold must have become zero.
        assert_close(name, wanted.float(), found, ratio=tolerance)


BOUND = Case(gate=-2.5, constant=True)
CASES = {
    **{
        f"T {time}, chunk {chunk}": Case(time=time, chunk=chunk, heads=1 if time > 130 else 2)
        for time in (1, 2, 3, 63, 130, 500)
        for chunk in (16, 32, 64)
    },
    "one gate a head": Case(gates=1),
    "without gates": Case(gate=0.0),
    "gates at the bound": Case(gate=-2.5),
    "one gate at the bound": Case(gate=-2.5, gates=1),
    "own states": Case(heads=3, states=3, time=70),
    "groups of three": Case(heads=6, states=2, time=66),
    "batch": Case(batch=3, time=65),
    "widths that fill no block": Case(features=20, gates=20, values=9, time=70),
    "wider than a block": Case(features=80, gates=80, values=72, time=70),
    "wider than a block, one gate": Case(features=80, gates=1, values=72, time=70),
    "without a denominator": Case(normalise=False),
    "packed": Case(cu_seqlens=(0, 1, 66, 66, 130)),
    "packed, one gate": Case(cu_seqlens=(0, 64, 67, 130), gates=1),
    "padding": Case(padding=70),
    "all at the bound": BOUND,
    "small gradients at the bound": replace(BOUND, upstream=1e-12, onward=1e-12),
    "small gradients of the last state alone": replace(BOUND, upstream=0.0, onward=1e-12),
    "large gradients at the bound": replace(BOUND, upstream=1e6, onward=1e6),
    "large keys and values at the bound": replace(BOUND, upstream=1e-4, size=100.0, large=100.0),
    "the same, without a denominator": replace(
        BOUND, upstream=1e-4, size=100.0, large=100.0, normalise=False
    ),
    "denominators near eps": Case(size=1e-4),
    "bf16": Case(dtype=torch.bfloat16, time=70),
    "bf16 with gates in fp32": Case(dtype=torch.bfloat16, gate_dtype=torch.float32),
    # One token outweighs the others: what is left of v - o is what rounding o to bf16 left.
    "bf16 at the bound": replace(BOUND, dtype=torch.bfloat16, loose=5.0),
    "fp16": Case(dtype=torch.float16, time=70),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_equals_reference(case: Case, passes: Passes, device: str) -> None:
    check(replace(case, passes=passes), device)


@pytest.mark.interp
@pytest.mark.parametrize("case", [Case(), replace(BOUND, loose=5.0)], ids=["weak", "at the bound"])
def test_products_of_16_bits_are_close_enough(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensor cores make them; the interpreter knows no bf16 but can round what enters."""
    multiply = InterpreterBuilder.create_dot

    def narrow(x):
        rounded = torch.from_numpy(x.data).bfloat16().to(torch.from_numpy(x.data).dtype)
        return type(x)(rounded.numpy(), x.dtype)

    def create_dot(self, a, b, *rest):
        return multiply(self, narrow(a), narrow(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    check(replace(case, dtype=torch.bfloat16, gate_dtype=torch.float32), "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("time", [1, 70])
def test_no_state_is_a_state_of_zeros(time: int, device: str) -> None:
    *leaves, state = (x.to(device) for x in Case(time=time).inputs())
    expected = fused_gla(*leaves, torch.zeros_like(state))
    for name, wanted, found in zip(NAMES, expected, fused_gla(*leaves), strict=False):
        assert_close(name, wanted.cpu(), found.cpu(), ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("time", [1, 2, 3, 16])
@pytest.mark.parametrize("gates", [16, 1], ids=["a gate per feature", "a gate per head"])
def test_few_tokens_without_gradients(gates: int, time: int, device: str) -> None:
    leaves = [x.to(device) for x in Case(time=time, gates=gates).inputs()]
    expected = parallel_gla(*(x.double().cpu() for x in leaves))
    for name, wanted, found in zip(NAMES, expected, fused_gla(*leaves), strict=False):
        assert_close(name, wanted, found.cpu(), ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("time", [3, 70])
def test_a_gate_that_is_no_number_shows(time: int, device: str) -> None:
    q, k, v, g, state = (x.to(device) for x in Case(time=time).inputs())
    g[0, 1] = float("nan")
    output, after = fused_gla(q.requires_grad_(time > 16), k, v, g, state)
    assert output[:, 1:].isnan().any()
    assert after.isnan().any()


@pytest.mark.interp
def test_what_does_not_fit_is_refused() -> None:
    q, k, v, g, state = Case(time=20, heads=3, states=1).inputs()
    fused_gla(q, k, v, g, state)
    with pytest.raises(UsageError, match="multiple of 2"):
        fused_gla(q, *(x.expand(-1, -1, 2, -1) for x in (k, v, g)))
    with pytest.raises(UsageError, match=r"\[B, T, S, V\]"):
        fused_gla(q, k, v[:, :9], g)
    with pytest.raises(UsageError, match="state"):
        fused_gla(q, k, v, g, state, cu_seqlens=torch.tensor([0, 9, 20]))
