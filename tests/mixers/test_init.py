import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgekit.errors import UsageError
from edgekit.kernels.conv_feature.reference import causal_conv
from edgekit.mixers.base import TokenMixer, mixer_names, mixer_type
from edgekit.models.config import DecoderConfig, LawcatConfig
from edgekit.models.decoder import Decoder, with_fresh_mixers
from edgekit.sources import Source, open_source
from edgekit.testing import TINY_FAMILIES

MIXERS = {
    "softmax": ("softmax", LawcatConfig()),
    "lolcats": ("lolcats", LawcatConfig()),
    "lawcat-q-head": ("lawcat", LawcatConfig(state_sharing="q_head")),
    "lawcat-kv-head": ("lawcat", LawcatConfig(state_sharing="kv_head")),
    "lawcat-ablated": ("lawcat", LawcatConfig(conv=False, normaliser=False)),
}
LAYER = 1
PREFIX = f"model.layers.{LAYER}.self_attn."


@pytest.fixture(params=TINY_FAMILIES)
def source(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Source:
    return open_source(tiny_checkpoint(request.param))


def teacher_tensors(source: Source) -> dict[str, torch.Tensor]:
    names = (name for name in source.weights if name.startswith(PREFIX))
    return {name.removeprefix(PREFIX): source.weights.tensor(name) for name in names}


def configured(source: Source, case: str) -> DecoderConfig:
    mixer, lawcat = MIXERS[case]
    return source.config.with_mixers((mixer,) * source.config.num_layers, lawcat)


def initialised(source: Source, case: str) -> TokenMixer:
    mixer = mixer_type(MIXERS[case][0])(configured(source, case))
    mixer.init_from_teacher(teacher_tensors(source), LAYER)
    return mixer


@pytest.mark.parametrize("case", MIXERS)
def test_teacher_tensors_stay_bit_identical(source: Source, case: str) -> None:
    kept = initialised(source, case).state_dict()
    teacher = teacher_tensors(source)
    assert len(teacher) >= 4
    for name, tensor in teacher.items():
        assert torch.equal(kept[name], tensor), name


@pytest.mark.parametrize("case", MIXERS)
def test_teacher_tensors_stay_bit_identical_in_a_whole_decoder(source: Source, case: str) -> None:
    config = configured(source, case)
    decoder = Decoder.from_store(config, with_fresh_mixers(config, source.weights))
    kept = decoder.state_dict()
    for name in source.weights:
        assert torch.equal(kept[name], source.weights.tensor(name)), name


@pytest.mark.parametrize("case", MIXERS)
def test_every_tensor_is_given_a_value(source: Source, case: str) -> None:
    mixer = mixer_type(MIXERS[case][0])(configured(source, case))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(torch.nan)
    mixer.init_from_teacher(teacher_tensors(source), LAYER)
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())


@pytest.mark.parametrize("case", MIXERS)
def test_a_missing_or_misshapen_teacher_tensor_is_refused(source: Source, case: str) -> None:
    mixer = mixer_type(MIXERS[case][0])(configured(source, case))
    teacher = teacher_tensors(source)
    with pytest.raises(RuntimeError, match="size mismatch"):
        mixer.init_from_teacher({**teacher, "o_proj.weight": torch.zeros(3, 3)}, LAYER)
    del teacher["v_proj.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        mixer.init_from_teacher(teacher, LAYER)


@pytest.mark.parametrize("case", ["lawcat-q-head", "lawcat-kv-head"])
def test_initial_decay_is_the_papers(source: Source, case: str) -> None:
    mixer = initialised(source, case)
    alpha = mixer.log_decay(torch.randn(2, 50, source.config.hidden_size)).exp()
    torch.testing.assert_close(alpha, torch.full_like(alpha, 0.5 ** (1 / 16)), atol=2e-4, rtol=0)
    assert round(alpha.mean().item(), 4) == 0.9576


def test_initial_decay_follows_the_gate_bias(source: Source) -> None:
    config = source.config.with_mixers(("lawcat",) * 3, LawcatConfig(gate_bias_init=4.0))
    mixer = mixer_type("lawcat")(config)
    mixer.init_from_teacher(teacher_tensors(source), LAYER)
    g = mixer.log_decay(torch.zeros(1, 1, source.config.hidden_size))
    assert round(math.log(0.5) / g.mean().item()) == 611


@pytest.mark.parametrize("case", ["lawcat-q-head", "lawcat-kv-head"])
def test_initial_convolution_is_almost_the_identity(source: Source, case: str) -> None:
    mixer = initialised(source, case)
    for taps in (mixer.conv_q.weight, mixer.conv_k.weight):
        assert torch.equal(taps[:, -1], torch.ones(taps.shape[0]))
        assert torch.equal(taps[:, :-1], torch.full_like(taps[:, :-1], 0.001))
        x = torch.randn(2, 20, taps.shape[0])
        y, _ = causal_conv(x, taps)
        assert (y - x).abs().max() <= 0.003 * x.abs().max()
        assert torch.equal(y[:, 0], x[:, 0])


def test_initial_feature_map_is_the_rectangular_identity(source: Source) -> None:
    weight = initialised(source, "lawcat-q-head").feature_map.weight
    config = source.config
    assert weight.shape == (config.num_heads, config.head_dim, config.head_dim // 2)
    assert all(torch.equal(w, torch.eye(config.head_dim, config.head_dim // 2)) for w in weight)


def test_fresh_gates_are_reproducible_and_differ_between_layers(source: Source) -> None:
    config = configured(source, "lawcat-q-head")
    fresh = mixer_type("lawcat").fresh_tensors
    first, again, other = fresh(config, 0), fresh(config, 0), fresh(config, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["gate_down.weight"], other["gate_down.weight"])
    assert 0.005 < first["gate_up.weight"].std() < 0.007


def test_mixers_are_found_by_file_name() -> None:
    assert {"lawcat", "softmax"} <= set(mixer_names())
    with pytest.raises(UsageError, match=r"mixer 'mamba' is unknown; known: .*lawcat"):
        mixer_type("mamba")
