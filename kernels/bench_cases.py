"""What the kernel benchmark runs: each op's inputs, its peers, and what it must do at least."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from edgekit.kernels import attention_mse, conv_feature, gla, kl_loss, spin_attention
from edgekit.kernels.dispatch import Form, forced

__all__ = [
    "CASES",
    "PROVING",
    "SHAPES",
    "Call",
    "Case",
    "Inputs",
    "Peer",
    "Results",
    "Shape",
    "Work",
]

Inputs = dict[str, Any]
Results = tuple[torch.Tensor, ...]
Call = Callable[[Inputs], Results]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a benchmark: batch, time, heads, width of a head, vocabulary and hidden size."""

    name: str
    batch: int
    time: int
    heads: int
    width: int
    vocabulary: int
    hidden: int


SHAPES = (
    Shape(name="D64", batch=8, time=4096, heads=16, width=64, vocabulary=49152, hidden=576),
    Shape(name="D128", batch=8, time=4096, heads=16, width=128, vocabulary=128256, hidden=2048),
)
# Small and awkward: what a form must get right before it is timed.
PROVING = Shape(name="proof", batch=1, time=130, heads=2, width=32, vocabulary=131, hidden=24)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What nobody can do without: bytes to move, and additions and multiplications in products."""

    moved: float
    operations: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another library's function.

    Attributes:
        call: it, which may raise ImportError.
        same: whether its results are ours, or the first of ours; else it does less.
    """

    call: Call
    same: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One op.

    Attributes:
        inputs: makes the arguments of a shape, in a dtype, on a device; leaves ask for gradients.
        call: the op itself, in whatever form is forced.
        forward: what the forward pass must do at least.
        both: the same of forward and backward; None: the op has no backward pass.
        peers: other libraries' functions, by name.
        compiled: whether torch.compile of the reference is of interest.
    """

    inputs: Callable[[Shape, torch.dtype, str], Inputs]
    call: Call
    forward: Callable[[Shape], Work]
    both: Callable[[Shape], Work] | None
    peers: Mapping[str, Peer] = field(default_factory=dict)
    compiled: bool = True

    def in_form(self, form: Form) -> Call:
        """The op in one of its own forms."""

        def run(inputs: Inputs) -> Results:
            with forced(form):
                return self.call(inputs)

        return run


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _tensors(count: int) -> Callable[[Shape], Work]:
    """Moving `count` times a `[B, T, H, D]` of 16 bits."""
    return lambda s: Work(moved=2.0 * count * s.batch * s.time * s.heads * s.width)


def _gla_inputs(gates: int | None) -> Callable[[Shape, torch.dtype, str], Inputs]:
    def made(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        size = (shape.batch, shape.time, shape.heads, shape.width)
        q, k = (_random(size, dtype, device).softmax(dim=-1) for _ in range(2))
        v = _random(size, dtype, device)
        rows = (*size[:3], gates or shape.width)
        g = functional.logsigmoid(_random(rows, torch.float32, device)).to(dtype) / 16
        return {name: x.requires_grad_() for name, x in (("q", q), ("k", k), ("v", v), ("g", g))}

    return made


def _with_ones(v: torch.Tensor) -> torch.Tensor:
    return torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)


def _fla_gla(inputs: Inputs) -> Results:
    """flash-linear-attention's gated kernel, the denominator as one more value."""
    chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla
    q, k, v, g = (inputs[n] for n in "qkvg")
    output, _ = chunk_gla(q, k, _with_ones(v), g, scale=1.0)
    return (output[..., :-1] / (output[..., -1:] + 1e-6),)


def _fla_gla_alone(inputs: Inputs) -> Results:
    """The same kernel without any denominator, which is another function."""
    chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla
    return (chunk_gla(*(inputs[n] for n in "qkvg"), scale=1.0)[0],)


def _fla_scalar(inputs: Inputs) -> Results:
    """The same with one gate for each head."""
    chunk = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    q, k, v, g = (inputs[n] for n in "qkvg")
    output, _ = chunk(q, k, _with_ones(v), g[..., 0], scale=1.0)
    return (output[..., :-1] / (output[..., -1:] + 1e-6),)


def _conv_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    size = (shape.batch, shape.time, shape.heads, shape.width)
    taps = _random((shape.heads * shape.width, 4), dtype, device)
    weight = _random((shape.heads, shape.width, shape.width // 2), dtype, device)
    leaves = {"x": _random(size, dtype, device), "taps": taps, "weight": weight}
    return {name: x.requires_grad_() for name, x in leaves.items()} | {"dtype": dtype}


def _kl_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    rows = shape.batch * shape.time
    hidden, teacher = (_random((rows, shape.hidden), dtype, device) for _ in range(2))
    head = _random((shape.vocabulary, shape.hidden), dtype, device) / shape.hidden**0.5
    targets = torch.randint(shape.vocabulary, (rows,), device=device)
    return {
        "hidden": hidden.requires_grad_(),
        "head": head,
        "targets": targets,
        "teacher_hidden": teacher,
    }


def _liger_ce(inputs: Inputs) -> Results:
    """Liger-Kernel's fused cross-entropy; it has no temperature-free KL beside it."""
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    ce = loss(reduction="sum")(inputs["head"], inputs["hidden"], inputs["targets"])
    return (ce,)


def _products(count: int) -> Callable[[Shape], Work]:
    """`count` products of all hidden states with the head."""

    def work(s: Shape) -> Work:
        rows = s.batch * s.time
        moved = 2.0 * (rows + s.vocabulary) * s.hidden
        return Work(moved=moved, operations=2.0 * count * rows * s.hidden * s.vocabulary)

    return work


def _mse_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    size = (shape.batch, shape.time, shape.heads * shape.width)
    y = _random(size, dtype, device).requires_grad_()
    return {"y": y, "expected": _random(size, dtype, device)}


def _spin_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    size = (shape.batch, shape.time, shape.heads, shape.width)
    q, k, v = (_random(size, dtype, device) for _ in range(3))
    image = torch.zeros(size[:2], dtype=torch.bool, device=device)
    image[:, 5 : 5 + shape.time // 8] = True
    return {"q": q, "k": k, "v": v, "image": image}


def _attention(s: Shape) -> Work:
    """Causal attention: two products of half the pairs."""
    tensor = float(s.batch * s.time * s.heads * s.width)
    return Work(moved=8.0 * tensor, operations=2.0 * tensor * s.time)


def _sdpa(inputs: Inputs) -> Results:
    """Attention alone, without any mass: what it costs in PyTorch."""
    q, k, v = (inputs[n].transpose(1, 2) for n in "qkv")
    return (functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)


CASES: Mapping[str, Case] = {
    "gla": Case(
        inputs=_gla_inputs(None),
        call=lambda x: (gla.gla(**x)[0],),
        forward=_tensors(5),
        both=_tensors(15),
        peers={
            "flash-linear-attention, ones as a value": Peer(call=_fla_gla),
            "flash-linear-attention, no denominator": Peer(call=_fla_gla_alone, same=False),
        },
        compiled=False,
    ),
    "gla-head-gate": Case(
        inputs=_gla_inputs(1),
        call=lambda x: (gla.gla(**x)[0],),
        forward=_tensors(4),
        both=_tensors(12),
        peers={"flash-linear-attention, ones as a value": Peer(call=_fla_scalar)},
        compiled=False,
    ),
    "conv_feature": Case(
        inputs=_conv_inputs,
        call=lambda x: (conv_feature.conv_feature(**x)[0],),
        forward=_tensors(2),
        both=_tensors(5),
    ),
    "kl_loss": Case(
        inputs=_kl_inputs,
        call=lambda x: kl_loss.vocabulary_loss(**x),
        forward=_products(2),
        both=_products(4),  # the gradients of both losses may be wanted apart
        peers={"Liger-Kernel, cross-entropy alone": Peer(call=_liger_ce)},
        compiled=False,
    ),
    "attention_mse": Case(
        inputs=_mse_inputs,
        call=lambda x: (attention_mse.attention_mse(**x),),
        forward=_tensors(2),
        both=_tensors(5),
    ),
    "spin_attention": Case(
        inputs=_spin_inputs,
        call=lambda x: spin_attention.spin_attention(**x),
        forward=_attention,
        both=None,
        peers={"attention alone (SDPA)": Peer(call=_sdpa)},
        compiled=False,
    ),
}
