"""The lean side path is the plain one, gradients included, and keeps little."""

import pytest
import torch

from edgekit.kernels.aflora import lean, reference
from edgekit.testing import TOLERANCE, assert_close

NAMES = ("x", "a", "b", "d_vector", "b_vector")
SCALE = 1.7


def inputs(shape: tuple[int, ...], rank: int, out: int, dtype: torch.dtype) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    sizes = (shape, (rank, shape[-1]), (out, rank), (rank,), (out,))
    return [torch.randn(size, generator=random, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 7), (63, 33)], ids=str)
@pytest.mark.parametrize(("rank", "out"), [(1, 1), (4, 13)])
def test_lean_equals_reference(shape: tuple[int, ...], rank: int, out: int) -> None:
    tensors = [t.requires_grad_() for t in inputs(shape, rank, out, torch.float64)]
    expected, actual = (form.side_path(*tensors, SCALE) for form in (reference, lean))
    assert_close("y", expected, actual, ratio=TOLERANCE["float64"])
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    pairs = (torch.autograd.grad(y, tensors, upstream) for y in (expected, actual))
    for name, wanted, found in zip(NAMES, *pairs, strict=True):
        assert_close(name, wanted, found, ratio=TOLERANCE["float64"])


def test_gradients_are_those_of_differences() -> None:
    tensors = [t.requires_grad_() for t in inputs((2, 3, 5), 3, 7, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: lean.side_path(*t, SCALE), tensors)


@pytest.mark.parametrize("trained", [("d_vector", "b_vector"), ("b",), ("a",), ("x", "b_vector")])
def test_only_what_is_trained_gets_a_gradient(trained: tuple[str, ...]) -> None:
    both = []
    for form in (reference, lean):
        tensors = dict(zip(NAMES, inputs((4, 6), 2, 5, torch.float64), strict=True))
        for name in trained:
            tensors[name].requires_grad_()
        form.side_path(**tensors, scale=SCALE).square().sum().backward()
        both.append([tensors[name].grad for name in NAMES])
    for name, wanted, found in zip(NAMES, *both, strict=True):
        assert (wanted is None) == (found is None) == (name not in trained)
        if wanted is not None and found is not None:
            assert_close(name, wanted, found, ratio=TOLERANCE["float64"])


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_kept_bytes(frozen: bool) -> None:
    tokens, wide, out, rank = 64, 512, 2048, 8
    x, a, b, d_vector, b_vector = inputs((tokens, wide), rank, out, torch.float32)
    for tensor in (x, d_vector, b_vector) + (() if frozen else (a, b)):
        tensor.requires_grad_()
    own = {t.data_ptr() for t in (a, b, d_vector, b_vector)}
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.extend([tensor.nbytes] if tensor.data_ptr() not in own else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lean.side_path(x, a, b, d_vector, b_vector, SCALE)
    inputs_kept = 0 if frozen else tokens * wide * 4
    assert inputs_kept <= sum(kept) < inputs_kept + rank * tokens * 4 * 1.1


def test_autocast_computes_narrow_and_returns_gradients_wide() -> None:
    tensors = [t.requires_grad_() for t in inputs((5, 6), 2, 7, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (form.side_path(*tensors, SCALE) for form in (reference, lean))
    assert actual.dtype == torch.bfloat16
    assert_close("y", expected, actual.to(expected.dtype), ratio=TOLERANCE["bfloat16"])
    actual.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tensors)
