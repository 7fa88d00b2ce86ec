"""LoLCATs: equal forms, streaming, padding, head layouts, gradients and the size of the state.

B batch, T time, S KV heads, G query heads per KV head, F features, d head width, w window.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

from edgekit.errors import UsageError
from edgekit.kernels.window.reference import chunked_window, parallel_window, recurrent_window
from edgekit.mixers.base import State
from edgekit.mixers.lolcats import Mixer
from edgekit.models.config import DecoderConfig, LolcatsConfig
from edgekit.models.decoder import step_context
from edgekit.models.rope import apply_rope, rope_tables
from edgekit.testing import TOLERANCE, assert_close

FORMS = ("parallel", "chunked", "recurrent")
WIDTH, LENGTH = 64, 150
LAYOUTS: dict[str, dict[str, Any]] = {
    "one-head-per-kv": {"num_heads": 2, "num_kv_heads": 2},
    "four-heads-per-kv": {"num_heads": 8, "num_kv_heads": 2},
    "seven-heads-per-kv": {"num_heads": 7, "num_kv_heads": 1},
    "wide-heads": {"head_dim": 24},
    "qwen2-biases": {"qkv_bias": True},
    "all-biases": {"qkv_bias": True, "o_bias": True},
    "qwen3-norms": {"qk_norm": True, "head_dim": 24},
    "odd-features": {"feature_dim": 5},
    "one-key-window": {"window": 1},
    "narrow-window": {"window": 7},
    "wide-window": {"window": 100},
    "window-past-the-end": {"window": 300},
    "separate-scales": {"common_scale": False},
}


def window_inputs(
    *, time: int, window: int = 9, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A call amid a sequence, B = 2, S = 2, G = 3, F = 6, d = 4; the second row began lately."""
    batch, states, groups, features, d = 2, 2, 3, 6, 4
    seen = torch.ones(batch, window + time, dtype=torch.bool)
    seen[1, : max(window - 2, 0)] = False
    inputs = {
        "q": torch.randn(batch, states, groups, time, d) * 2,
        "k": torch.randn(batch, states, window + time, d),
        "v": torch.randn(batch, states, window + time, d),
        "phi_q": torch.rand(batch, states, groups, time, features),
        "phi_k": torch.rand(batch, states, groups, time, features)
        * seen[:, None, None, :time, None],
        "log_gamma": -torch.rand(states, groups) * 3,
        "state": torch.rand(batch, states, groups, features, d + 1),
    }
    return {name: x.to(dtype) for name, x in inputs.items()} | {"seen": seen}


@pytest.mark.parametrize("common_scale", [True, False], ids=["common-scale", "separate-scales"])
@pytest.mark.parametrize("window", [1, 9, 64, 100], ids=lambda w: f"w{w}")
@pytest.mark.parametrize("time", [1, 2, 3, 63, 64, 65, 150], ids=lambda t: f"T{t}")
def test_forms_agree(time: int, window: int, common_scale: bool) -> None:
    inputs = window_inputs(time=time, window=window)
    expected, expected_state = recurrent_window(**inputs, common_scale=common_scale)
    results = {
        "parallel": parallel_window(**inputs, common_scale=common_scale),
        "chunks of 64": chunked_window(**inputs, common_scale=common_scale),
        "chunks of 16": chunked_window(**inputs, common_scale=common_scale, chunk=16),
    }
    for name, (output, state) in results.items():
        assert_close(f"{name}: output", expected, output, ratio=1e-5)
        assert_close(f"{name}: state", expected_state, state, ratio=1e-5)


@pytest.mark.parametrize("size", [30.0, -30.0, 300.0], ids=str)
def test_extreme_logits_stay_finite(size: float) -> None:
    inputs = window_inputs(time=70)
    inputs["q"] = torch.full_like(inputs["q"], size)
    inputs["k"] = inputs["k"].abs()
    expected, _ = recurrent_window(**inputs)
    assert_close("chunked", expected, chunked_window(**inputs)[0], ratio=1e-5)


def test_window_alone_is_softmax_and_far_logits_leave_the_linear_mean() -> None:
    inputs = window_inputs(time=9)
    fresh = {**inputs, "state": torch.zeros_like(inputs["state"])}
    fresh["seen"] = torch.arange(18) >= 9
    fresh["seen"] = fresh["seen"].expand(2, -1)
    fresh["phi_k"] = torch.zeros_like(inputs["phi_k"])
    alone = functional.scaled_dot_product_attention(
        inputs["q"],
        inputs["k"][:, :, None, 9:].expand(-1, -1, 3, -1, -1),
        inputs["v"][:, :, None, 9:].expand(-1, -1, 3, -1, -1),
        is_causal=True,
        scale=1.0,
    )
    assert_close("window alone", alone, chunked_window(**fresh)[0], ratio=TOLERANCE["float32"])
    faint = {**inputs, "log_gamma": torch.full_like(inputs["log_gamma"], -200.0)}
    after = inputs["state"][:, :, :, None] + (
        inputs["phi_k"][..., None]
        * functional.pad(inputs["v"][:, :, None, :9, None], (0, 1), value=1.0)
    ).cumsum(dim=3)
    n = (inputs["phi_q"][..., None, :] @ after)[..., 0, :]
    assert_close("linear alone", n[..., :-1] / n[..., -1:], chunked_window(**faint)[0], ratio=1e-5)


@pytest.mark.parametrize("shift", [5.0, -5.0], ids=["up", "down"])
def test_only_separate_scales_ignore_the_size_of_the_logits(shift: float) -> None:
    inputs = window_inputs(time=30)
    inputs["q"][..., -1], inputs["k"][..., -1] = shift, 0.0
    moved = {**inputs, "k": inputs["k"].clone()}
    moved["k"][..., -1] = 1.0  # adds `shift` to every logit of the window
    apart = [parallel_window(**x, common_scale=False)[0] for x in (inputs, moved)]
    assert_close("separate scales", apart[0], apart[1], ratio=1e-5)
    common, changed = (parallel_window(**x)[0] for x in (inputs, moved))
    weighted = {**inputs, "log_gamma": inputs["log_gamma"] + shift}
    assert_close("as a weight", parallel_window(**weighted)[0], changed, ratio=1e-5)
    assert (common - changed).abs().max() > 1e-2


def gradients(form: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items() if n != "seen"}
    output, state = form(**leaves, seen=inputs["seen"])
    weights = torch.linspace(0, 1, output.numel(), dtype=output.dtype).view_as(output)
    ((output * weights).sum() + state.square().sum()).backward()
    return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("form", [chunked_window, recurrent_window], ids=["chunked", "recurrent"])
def test_gradients_agree(form: Callable[..., Any], dtype: torch.dtype) -> None:
    inputs = window_inputs(time=150, dtype=dtype)
    expected, actual = gradients(parallel_window, inputs), gradients(form, inputs)
    assert len(expected) == len(actual) == 7
    names = [name for name in inputs if name != "seen"]
    for name, reference, ours in zip(names, expected, actual, strict=True):
        ratio = 1e-10 if dtype == torch.float64 else 1e-4
        assert_close(f"gradient of {name}", reference, ours, ratio=ratio)


@pytest.mark.parametrize("common_scale", [True, False], ids=["common-scale", "separate-scales"])
def test_gradcheck_of_the_chunked_form(common_scale: bool) -> None:
    inputs = window_inputs(time=5, window=3, dtype=torch.float64)
    seen = inputs.pop("seen")
    cut = {name: x[:1, :1] if x.dim() > 2 else x[:1] for name, x in inputs.items()}
    leaves = [x.clone().requires_grad_() for x in cut.values()]

    def form(*tensors: torch.Tensor) -> Any:
        named = dict(zip(cut, tensors, strict=True))
        return chunked_window(**named, seen=seen[:1], common_scale=common_scale, chunk=2)

    assert torch.autograd.gradcheck(form, leaves)


def make_mixer(**layout: Any) -> Mixer:
    """A mixer with every parameter random, so that a forgotten one shows."""
    names = ("feature_dim", "window", "common_scale")
    options = {key: layout.pop(key) for key in names if key in layout}
    settings = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, **layout}
    config = DecoderConfig(
        family="llama",
        vocab_size=320,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_layers=1,
        context_length=512,
        mixers=("lolcats",),
        lolcats=LolcatsConfig(**{"window": 16, **options}),
        **settings,
    )
    mixer = Mixer(config)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            scale = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
    return mixer.requires_grad_(False)


def run(
    mixer: Mixer,
    x: torch.Tensor,
    form: str = "chunked",
    cuts: tuple[int, ...] = (),
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """The mixer over `x`, cut into calls."""
    state: State | None = None
    outputs = []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        so_far = None if mask is None else mask[:, :stop]
        context = step_context(mixer.config, stop - start, stop, so_far, form)  # type: ignore[arg-type]
        y, state = mixer(x[:, start:stop], context, state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def defined(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    """The mixer by its definition, one head and one token at a time, in fp64; `x [T, D]`."""
    config, w = mixer.config, {n: t.double() for n, t in mixer.state_dict().items()}
    d, window, time = config.head_dim, config.lolcats.window, len(x)
    cos, sin = (y.double() for y in rope_tables(config.rope, d, torch.arange(time)))

    def heads(name: str) -> torch.Tensor:
        y = functional.linear(x, w[f"{name}_proj.weight"], w.get(f"{name}_proj.bias"))
        y = y.unflatten(-1, (-1, d))
        if config.qk_norm and name != "v":
            mean_square = y.square().mean(dim=-1, keepdim=True)
            y = y / (mean_square + config.rms_norm_eps).sqrt() * w[f"{name}_norm.weight"]
        return y if name == "v" else apply_rope(y[None], cos[None], sin[None])[0]

    def features(y: torch.Tensor, name: str, head: int) -> torch.Tensor:
        u = y @ w[f"feature_map_{name}.weight"][head]
        return torch.cat((u.softmax(-1), (-u).softmax(-1)), dim=-1).clamp_min(1e-12)

    q, k, v = heads("q"), heads("k"), heads("v")
    outputs = torch.zeros(time, config.num_heads, d, dtype=torch.float64)
    for h in range(config.num_heads):
        kv = h // config.groups
        gamma = torch.sigmoid(w["window_factor.weight"][h])
        for t in range(time):
            first = max(t - window + 1, 0)
            scores = k[first : t + 1, kv] @ q[t, h] * d**-0.5
            if not config.lolcats.common_scale:
                scores = scores - scores.max()
            near = gamma * scores.exp()
            far = features(k[:first, kv], "k", h) @ features(q[t, h], "q", h)
            total = near.sum() + far.sum() + config.lolcats.eps
            outputs[t, h] = (near @ v[first : t + 1, kv] + far @ v[:first, kv]) / total
    return functional.linear(outputs.flatten(1), w["o_proj.weight"], w.get("o_proj.bias"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_equals_the_definition(layout: str) -> None:
    mixer = make_mixer(**LAYOUTS[layout])
    x = torch.randn(2, LENGTH, WIDTH)
    expected = torch.stack([defined(mixer, row.double()) for row in x])
    for form in FORMS:
        assert_close(form, expected, run(mixer, x, form)[0], ratio=TOLERANCE["float32"])


SPLITS: dict[str, tuple[int, ...]] = {
    "one-then-rest": (1,),
    "two-then-rest": (2,),
    "three-then-rest": (3,),
    "rest-then-one": (LENGTH - 1,),
    "token-by-token-tail": (LENGTH - 3, LENGTH - 2, LENGTH - 1),
    "short-pieces": (1, 3, 4, 6, 7, 10, 16, 33),
    "at-the-window": (16,),
    "every-token": tuple(range(1, LENGTH)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", SPLITS)
def test_pieces_equal_one_pass(form: str, split: str) -> None:
    mixer = make_mixer()
    x = torch.randn(2, LENGTH, WIDTH)
    expected, expected_state = run(mixer, x, form)
    output, state = run(mixer, x, form, SPLITS[split])
    assert_close("output", expected, output, ratio=TOLERANCE["float32"])
    for name in expected_state:
        assert_close(name, expected_state[name], state[name], ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [(), (1,), (4,), (5, 6, 30)], ids=str)
def test_padding_is_a_no_op(form: str, cuts: tuple[int, ...]) -> None:
    mixer = make_mixer()
    rows = [slice(0, 40), slice(3, 40), slice(39, 40), slice(0, 2), slice(5, 25)]
    x = torch.randn(len(rows) + 1, 40, WIDTH)
    mask = torch.zeros(x.shape[:2], dtype=torch.int64)
    for row, part in enumerate(rows):
        mask[row, part] = 1
    mask[-1, 0:9] = mask[-1, 12:30] = 1  # padding amid a row
    x = torch.where(mask.bool()[..., None], x, torch.full_like(x, 1e3))
    output, state = run(mixer, x, form, cuts, mask)
    for row in range(len(x)):
        kept = mask[row].bool()
        alone, alone_state = run(mixer, x[row : row + 1, kept], form)
        got = output[row : row + 1, kept]
        assert_close(f"row {row}", alone, got, ratio=TOLERANCE["float32"])
        seen = alone_state["seen"][0]
        assert torch.equal(seen, state["seen"][row])
        assert_close("ssm", alone_state["ssm"][0], state["ssm"][row], ratio=1e-5)
        for name in ("key", "value"):
            ours = state[name][row][:, seen]
            assert_close(name, alone_state[name][0][:, seen], ours, ratio=1e-5)


def test_a_row_of_padding_leaves_the_state_alone() -> None:
    mixer = make_mixer()
    _, before = run(mixer, torch.randn(1, 29, WIDTH))
    mask = torch.cat((torch.ones(1, 29), torch.zeros(1, 4)), dim=1)
    _, after = mixer(
        torch.randn(1, 4, WIDTH), step_context(mixer.config, 4, 33, mask, "chunked"), before
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("form", FORMS)
def test_state_bytes_do_not_depend_on_the_length(form: str) -> None:
    mixer = make_mixer()
    expected = {"key": (1, 2, 16, 16), "value": (1, 2, 16, 16), "seen": (1, 16)}
    for time in (1, 2, 200):
        _, state = run(mixer, torch.randn(1, time, WIDTH), form)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        assert shapes == {**expected, "ssm": (1, 4, 32, 17)}
        assert all(
            tensor.untyped_storage().nbytes() <= 4 * tensor.numel() for tensor in state.values()
        )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_new_parameter(form: str) -> None:
    mixer = make_mixer()
    new = dict.fromkeys(mixer.fresh_tensors(mixer.config, 0))
    for name, parameter in mixer.named_parameters():
        parameter.requires_grad_(name in new)
    run(mixer, torch.randn(2, 70, WIDTH), form)[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        if name in new:
            assert parameter.grad is not None
            assert parameter.grad.reshape(4, -1).any(dim=1).all(), name  # of every head
        else:
            assert parameter.grad is None


def test_autocast_does_not_narrow_the_attention() -> None:
    mixer = make_mixer()
    x = torch.randn(1, 70, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = run(mixer, x)
    assert state["ssm"].dtype == torch.float32
    assert_close("output", run(mixer, x)[0], output, ratio=TOLERANCE["bfloat16"])


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(UsageError, match="window 0 given; allowed: 1 or more"):
        LolcatsConfig(window=0)
