"""LAWCAT: equal forms, streaming, padding, head layouts and the size of the state.

B batch, T time, H query heads, S state heads, F features, d head width, D hidden width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

from edgekit.kernels.conv_feature.reference import feature_map
from edgekit.kernels.gla import chunked, reference
from edgekit.kernels.gla.reference import parallel_gla, recurrent_gla
from edgekit.mixers.base import MixerContext, State
from edgekit.mixers.lawcat import Mixer
from edgekit.models.config import DecoderConfig, LawcatConfig
from edgekit.testing import TOLERANCE, assert_close

CHUNKED = {"plain": reference.chunked_gla, "by-hand": chunked.chunked_gla}
FORMS = ("parallel", "chunked", "recurrent")
GATE_LOGITS = {"typical": None, "zero": 0.0, "minus-30": -30.0, "floor": -100.0, "open": 30.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one-head-per-kv": {"num_heads": 2, "num_kv_heads": 2},
    "four-heads-per-kv": {"num_heads": 8, "num_kv_heads": 2},
    "seven-heads-per-kv": {"num_heads": 7, "num_kv_heads": 1},
    "wide-heads": {"head_dim": 24},
    "narrow-heads": {"head_dim": 6},
    "qwen2-biases": {"qkv_bias": True},
    "all-biases": {"qkv_bias": True, "o_bias": True},
    "qwen3-norms": {"qk_norm": True, "head_dim": 24},
    "odd-features": {"feature_dim": 5},
    "two-taps": {"conv_size": 2},
    "no-convolution": {"conv": False},
    "no-normaliser": {"normaliser": False},
}
SHARING = ("q_head", "kv_head")


def gla_inputs(
    logit: float | None, *, time: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Features, values, gates and an entering state for H = 6, S = 2, F = 16, d = 8."""
    batch, heads, states, features, width = 2, 6, 2, 16, 8
    maps = torch.randn(heads, width, features // 2) * 2
    q = feature_map(torch.randn(batch, time, heads, width), maps)
    k = feature_map(torch.randn(batch, time, states, width), maps[:states])
    a = torch.randn(batch, time, states, features) * 3
    a = a if logit is None else torch.full_like(a, logit)
    inputs = {
        "q": q,
        "k": k,
        "v": torch.randn(batch, time, states, width),
        "g": (functional.logsigmoid(a) / 16).clamp_min(-2.5),
        "state": torch.rand(batch, states, features, width + 1),
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


@pytest.mark.parametrize("gate", GATE_LOGITS)
@pytest.mark.parametrize("time", [1, 3, 16, 63, 64, 65, 150], ids=lambda t: f"T{t}")
def test_forms_agree(gate: str, time: int) -> None:
    inputs = gla_inputs(GATE_LOGITS[gate], time=time)
    expected, expected_state = recurrent_gla(**inputs)
    results = {"parallel": parallel_gla(**inputs)}
    for name, form in CHUNKED.items():
        results[f"{name}, chunks of 64"] = form(**inputs)
        results[f"{name}, chunks of 16"] = form(**inputs, chunk=16)
    for name, (output, state) in results.items():
        assert_close(f"{name}: output", expected, output, ratio=1e-5)
        assert_close(f"{name}: state", expected_state, state, ratio=1e-5)


@pytest.mark.parametrize("gate", GATE_LOGITS)
def test_forms_agree_exactly_in_double(gate: str) -> None:
    inputs = gla_inputs(GATE_LOGITS[gate], time=70, dtype=torch.float64)
    expected, _ = recurrent_gla(**inputs)
    for form in (parallel_gla, *CHUNKED.values()):
        assert_close(form.__name__, expected, form(**inputs)[0], ratio=TOLERANCE["float64"])


def test_outputs_are_weighted_means_of_values() -> None:
    inputs = gla_inputs(None, time=40)
    del inputs["state"]
    output, _ = chunked.chunked_gla(
        **inputs, eps=1e-12
    )  # sharp features: q.k may be below the usual eps
    first = inputs["v"][:, 0].repeat_interleave(3, dim=1)
    assert_close("first output", first, output[:, 0], ratio=TOLERANCE["float32"])
    inputs["v"] = torch.full_like(inputs["v"], 2.5)
    constant, _ = chunked.chunked_gla(**inputs, eps=1e-12)
    assert_close("constant", torch.full_like(constant, 2.5), constant, ratio=1e-5)


def gradients(
    form: Callable[..., Any], inputs: dict[str, torch.Tensor], **options: Any
) -> list[torch.Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    output, state = form(**leaves, **options)
    weights = torch.linspace(0, 1, output.numel(), dtype=output.dtype).view_as(output)
    ((output * weights).sum() + state.square().sum()).backward()
    return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


@pytest.mark.parametrize("form", CHUNKED)
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "scaled"])
@pytest.mark.parametrize("gate", GATE_LOGITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_gradients_agree(gate: str, dtype: torch.dtype, normalise: bool, form: str) -> None:
    inputs = gla_inputs(GATE_LOGITS[gate], time=70, dtype=dtype)
    expected = gradients(parallel_gla, inputs, normalise=normalise)
    actual = gradients(CHUNKED[form], inputs, normalise=normalise)
    ratio = 1e-10 if dtype == torch.float64 else 1e-4
    assert len(expected) == len(inputs)
    for name, right, ours in zip(inputs, expected, actual, strict=True):
        assert_close(f"gradient of {name}", right, ours, ratio=ratio)


@pytest.mark.parametrize("form", CHUNKED)
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "scaled"])
def test_gradcheck_of_the_chunked_forms(form: str, normalise: bool) -> None:
    shapes = {"q": (1, 5, 4, 3), "k": (1, 5, 2, 3), "v": (1, 5, 2, 2), "g": (1, 5, 2, 3)}
    inputs = [torch.rand(shape, dtype=torch.float64) + 0.1 for shape in shapes.values()]
    inputs[3] = -inputs[3]
    inputs.append(torch.rand(1, 2, 3, 3, dtype=torch.float64) + 0.1)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    options = {"normalise": normalise, "chunk": 2}
    assert torch.autograd.gradcheck(lambda *x: CHUNKED[form](*x, **options), leaves)


def test_the_form_by_hand_keeps_no_pairwise_weights() -> None:
    leaves = {name: x.requires_grad_() for name, x in gla_inputs(None, time=256).items()}
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked.chunked_gla(**leaves)
    assert kept
    assert not [shape for shape in kept if 64 in shape[-1:]]  # C, while F = 16 and V = 9


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_narrow_the_recurrence(form: str) -> None:
    mixer = make_mixer("q_head").requires_grad_()
    x = torch.randn(2, 70, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = mixer(x, context(form))
        output.square().mean().backward()
    assert state["ssm"].dtype == torch.float32
    assert_close("output", mixer(x, context(form))[0], output, ratio=TOLERANCE["bfloat16"])
    assert all(weight.grad is not None for weight in mixer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_form_by_hand_is_the_same_under_autocast(dtype: torch.dtype) -> None:
    inputs = gla_inputs(None, time=70, dtype=dtype)
    expected = gradients(chunked.chunked_gla, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(chunked.chunked_gla, inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def make_mixer(sharing: str, **layout: Any) -> Mixer:
    """A mixer with every parameter random, so that a forgotten one shows."""
    names = ("feature_dim", "conv_size", "conv", "normaliser")
    options = {key: layout.pop(key) for key in names if key in layout}
    settings = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, **layout}
    config = DecoderConfig(
        family="llama",
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_layers=1,
        context_length=512,
        mixers=("lawcat",),
        lawcat=LawcatConfig(state_sharing=sharing, **options),  # type: ignore[arg-type]
        **settings,
    )
    mixer = Mixer(config)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            scale = 1.0 if parameter.dim() == 1 or "conv" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
    return mixer.requires_grad_(False)


def context(form: str = "chunked", mask: torch.Tensor | None = None) -> MixerContext:
    return MixerContext(rotate=lambda x: x, mask=mask, past_mask=mask, form=form)  # type: ignore[arg-type]


def defined(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    """The mixer by its definition, one head and one token at a time, in fp64; `x [T, D]`."""
    config, w = mixer.config, {n: t.double() for n, t in mixer.state_dict().items()}
    d, groups, heads = config.head_dim, config.groups, config.num_heads
    per_query = config.lawcat.state_sharing == "q_head"

    def project(name: str) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def head(y: torch.Tensor, index: int, norm: str) -> torch.Tensor:
        part = y[:, index * d : (index + 1) * d]
        if not config.qk_norm or not norm:
            return part
        mean_square = part.square().mean(dim=-1, keepdim=True)
        return part / (mean_square + config.rms_norm_eps).sqrt() * w[f"{norm}.weight"]

    def features(y: torch.Tensor, conv: str, index: int, matrix: torch.Tensor) -> torch.Tensor:
        if config.lawcat.conv:
            taps = w[f"{conv}.weight"][index * d : (index + 1) * d]
            size = taps.shape[1]
            past = functional.pad(y, (0, 0, size - 1, 0))
            y = sum(taps[:, j] * past[j : j + len(y)] for j in range(size))
        u = y @ matrix
        return torch.cat((u.softmax(-1), (-u).softmax(-1)), dim=-1).clamp_min(1e-12)

    q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
    a = functional.linear(
        x @ w["gate_down.weight"].T, w["gate_up.weight"], w["gate_up.bias"]
    ).unflatten(-1, (config.num_kv_heads, -1))
    outputs = []
    for h in range(heads):
        kv = h // groups
        owner = h if per_query else kv
        matrix = w["feature_map.weight"][owner]
        phi_q = features(head(q, h, "q_norm"), "conv_q", h, matrix)
        phi_k = features(head(k, kv, "k_norm"), "conv_k", owner, matrix)
        alpha = (functional.logsigmoid(a[:, kv]) / 16).clamp_min(-2.5).exp()
        values = functional.pad(head(v, kv, ""), (0, 1), value=1.0)
        state = torch.zeros(phi_k.shape[1], d + 1, dtype=torch.float64)
        rows = []
        for t in range(len(x)):
            state = alpha[t][:, None] * state + phi_k[t][:, None] * values[t]
            n = phi_q[t] @ state
            below = n[d] + config.lawcat.eps if config.lawcat.normaliser else len(state) ** 0.5
            rows.append(n[:d] / below)
        outputs.append(torch.stack(rows))
    return functional.linear(torch.cat(outputs, dim=-1), w["o_proj.weight"], w.get("o_proj.bias"))


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_equals_the_definition(sharing: str, layout: str) -> None:
    mixer = make_mixer(sharing, **LAYOUTS[layout])
    x = torch.randn(2, 70, 64)
    expected = torch.stack([defined(mixer, row.double()) for row in x])
    for form in FORMS:
        output, _ = mixer(x, context(form))
        assert_close(form, expected, output, ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("sharing", SHARING)
def test_extreme_gates_stay_finite(sharing: str) -> None:
    mixer = make_mixer(sharing)
    x = torch.randn(1, 200, 64)
    for logit in (-30.0, -1000.0, 0.0, 1000.0):
        mixer.gate_up.bias.fill_(logit)
        expected, _ = mixer(x, context("recurrent"))
        assert_close(f"gate {logit}", expected, mixer(x, context())[0], ratio=1e-5)


def run_in_pieces(
    mixer: Mixer, x: torch.Tensor, cuts: list[int], form: str, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, State]:
    state: State | None = None
    outputs = []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        part = None if mask is None else mask[:, start:stop]
        y, state = mixer(x[:, start:stop], context(form, part), state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


SPLITS = {
    "one-then-rest": [1],
    "two-then-rest": [2],
    "rest-then-one": [69],
    "rest-then-two": [68],
    "token-by-token-tail": [66, 67, 68, 69],
    "short-pieces": [1, 3, 4, 6, 7, 10],
    "at-the-chunk": [64],
    "every-token": list(range(1, 70)),
    "random": sorted(torch.randperm(69, generator=torch.Generator().manual_seed(7))[:9].add(1)),
}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", SPLITS)
def test_pieces_equal_one_pass(sharing: str, form: str, split: str) -> None:
    mixer = make_mixer(sharing)
    x = torch.randn(2, 70, 64)
    expected, expected_state = mixer(x, context(form))
    output, state = run_in_pieces(mixer, x, [int(cut) for cut in SPLITS[split]], form)
    assert_close("output", expected, output, ratio=TOLERANCE["float32"])
    for name in expected_state:
        assert_close(name, expected_state[name], state[name], ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [[], [1], [4], [5, 6, 30]], ids=str)
def test_left_and_right_padding_are_no_ops(sharing: str, form: str, cuts: list[int]) -> None:
    mixer = make_mixer(sharing)
    lengths, left = [40, 37, 1, 2, 20], [0, 3, 39, 0, 5]
    x = torch.randn(len(lengths), 40, 64)
    mask = torch.zeros(len(lengths), 40, dtype=torch.int64)
    for row, (length, skip) in enumerate(zip(lengths, left, strict=True)):
        mask[row, skip : skip + length] = 1
    x = torch.where(mask.bool()[..., None], x, torch.full_like(x, 1e3))
    output, state = run_in_pieces(mixer, x, cuts, form, mask)
    for row, (length, skip) in enumerate(zip(lengths, left, strict=True)):
        alone, alone_state = mixer(x[row : row + 1, skip : skip + length], context(form))
        got = output[row : row + 1, skip : skip + length]
        assert_close(f"row {row}", alone, got, ratio=TOLERANCE["float32"])
        for name in state:
            ours = state[name][row : row + 1]
            assert_close(f"row {row}: {name}", alone_state[name], ours, ratio=1e-5)


def test_a_row_of_padding_leaves_the_state_alone() -> None:
    mixer = make_mixer("q_head")
    _, before = mixer(torch.randn(1, 9, 64), context())
    _, after = mixer(torch.randn(1, 4, 64), context(mask=torch.zeros(1, 4)), before)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("form", FORMS)
def test_state_bytes_do_not_depend_on_the_length(sharing: str, form: str) -> None:
    mixer = make_mixer(sharing)
    heads = 4 if sharing == "q_head" else 2
    expected = {"ssm": (1, heads, 16, 17), "conv": (1, (4 + heads) * 16, 3)}
    _, state = mixer(torch.randn(1, 1, 64), context(form))
    for time in (1, 2, 300, 1):
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        assert all(
            tensor.untyped_storage().nbytes() <= 4 * tensor.numel() for tensor in state.values()
        )
        _, state = mixer(torch.randn(1, time, 64), context(form), state)


def test_without_convolution_there_is_no_convolution_state() -> None:
    mixer = make_mixer("q_head", conv=False)
    _, state = mixer(torch.randn(1, 5, 64), context())
    assert set(state) == {"ssm"}
    assert not [name for name in mixer.state_dict() if "conv" in name]


@pytest.mark.parametrize("ablation", ["conv", "normaliser"])
@pytest.mark.parametrize("form", FORMS)
def test_ablations_stream(ablation: str, form: str) -> None:
    mixer = make_mixer("kv_head", **{ablation: False})
    x = torch.randn(2, 70, 64)
    expected, _ = mixer(x, context(form))
    output, _ = run_in_pieces(mixer, x, [1, 3, 66], form)
    assert_close("output", expected, output, ratio=TOLERANCE["float32"])
