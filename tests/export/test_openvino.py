"""The OpenVINO graph against the torch decoder, at the level of single calls."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch

from edgekit.export.openvino_file import write_openvino
from edgekit.export.to_openvino import build_openvino
from edgekit.models.config import DecoderConfig, LolcatsConfig
from edgekit.models.decoder import Decoder
from edgekit.models.weights import MemoryStore, OverlayStore, WeightStore
from edgekit.testing import scrambled_decoder

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
LAYOUTS = {
    "softmax": (("softmax",) * 3, "q_head"),
    "lawcat-q": (("lawcat",) * 3, "q_head"),
    "lawcat-kv": (("lawcat",) * 3, "kv_head"),
    "hybrid": (("softmax", "lawcat", "softmax"), "kv_head"),
    "lolcats": (("lolcats",) * 3, "q_head"),
    "three-mixers": (("lolcats", "softmax", "lawcat"), "q_head"),
}
BLOCKS = (1, 2, 61, 3, 64, 65, 1, 1, 130, 1)  # below, at, above and across chunks of 64
MAX_ABS = 1e-4
PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def model_of(
    checkpoint: Path, layout: str, **lawcat: object
) -> tuple[DecoderConfig, WeightStore, Decoder]:
    return scrambled_decoder(checkpoint, *LAYOUTS[layout], **lawcat)


class Caller:
    """Feeds one infer request as a runtime would."""

    def __init__(self, model: ov.Model, batch: int) -> None:
        self.request = ov.Core().compile_model(model, "CPU", PRECISE).create_infer_request()
        self.names = {name for port in model.inputs for name in port.get_names()}
        self.mask = np.zeros((batch, 0), np.int64)

    def __call__(
        self, ids: torch.Tensor, mask: np.ndarray | None = None, beam: list[int] | None = None
    ) -> np.ndarray:
        new = np.ones(ids.shape, np.int64) if mask is None else mask
        rows = list(range(ids.shape[0])) if beam is None else beam
        self.mask = np.concatenate((self.mask[rows] if len(self.mask) else new[:, :0], new), axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feed = {
            "input_ids": ids.numpy(),
            "attention_mask": self.mask,
            "position_ids": positions,
            "beam_idx": np.array(rows, np.int32),
        }
        return self.request.infer({n: feed[n] for n in self.names})["logits"].copy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_blocks_equal_one_pass(
    family: str, layout: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint(family), layout)
    ids = torch.randint(0, config.vocab_size, (2, sum(BLOCKS)))
    with torch.inference_mode():
        expected, _ = decoder(ids, form="parallel")
    call, end = Caller(build_openvino(config, weights), 2), 0
    for size in BLOCKS:
        logits = call(ids[:, end : end + size])
        end += size
        assert logits.shape == (2, 1, config.vocab_size)
        assert np.abs(logits[:, 0] - expected[:, end - 1].numpy()).max() <= MAX_ABS, (size, end)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_left_padding_is_a_no_op(
    family: str, layout: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint(family), layout)
    lengths, width = (3, 70, 131), 131
    ids = torch.randint(0, config.vocab_size, (3, width))
    mask = np.array([[0] * (width - n) + [1] * n for n in lengths])
    call = Caller(build_openvino(config, weights), 3)
    padded = [call(ids[:, :100], mask[:, :100]), call(ids[:, 100:], mask[:, 100:])][-1]
    following = call(ids[:, :1])
    for row, length in enumerate(lengths):
        alone = torch.cat((ids[row : row + 1, width - length :], ids[row : row + 1, :1]), dim=1)
        with torch.inference_mode():
            expected, _ = decoder(alone)
        assert np.abs(padded[row, 0] - expected[0, -2].numpy()).max() <= MAX_ABS
        assert np.abs(following[row, 0] - expected[0, -1].numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_beam_idx_reorders_every_state(layout: str, tiny_checkpoint: Callable[..., Path]) -> None:
    config, weights, _ = model_of(tiny_checkpoint("llama"), layout)
    model = build_openvino(config, weights)
    ids = torch.randint(0, config.vocab_size, (1, 20))
    one, many = Caller(model, 1), Caller(model, 1)
    one(ids)
    many(ids)
    following = torch.randint(0, config.vocab_size, (3, 1))
    first = many(following, beam=[0, 0, 0])
    swapped = many(following[[2, 2, 0]], beam=[2, 0, 1])
    expected = one(following[:1])
    assert np.abs(first[0] - expected[0]).max() <= MAX_ABS
    replay = Caller(model, 1)
    replay(ids)
    replay(following[2:])
    assert np.abs(swapped[0] - replay(following[2:])[0]).max() <= MAX_ABS


def test_gates_at_the_floor_stay_finite(tiny_checkpoint: Callable[..., Path]) -> None:
    """Gate logits of -30 and far below the floor: factors of the chunk form reach e^80."""
    config, weights, _ = model_of(tiny_checkpoint("llama"), "lawcat-kv")
    for bias in (-30.0, -1000.0, 0.0):
        name = "model.layers.{}.self_attn.gate_up.bias"
        biases = {n: torch.full_like(weights.tensor(n), bias) for n in map(name.format, range(3))}
        extreme = OverlayStore(MemoryStore(biases), weights)
        ids = torch.randint(0, config.vocab_size, (1, 200))
        with torch.inference_mode():
            expected, _ = Decoder.from_store(config, extreme)(ids, form="parallel")
        logits = Caller(build_openvino(config, extreme), 1)(ids)
        assert np.abs(logits[0, 0] - expected[0, -1].numpy()).max() <= MAX_ABS, bias


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rope_on_the_recurrent_path(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    config, weights, decoder = model_of(tiny_checkpoint(family), "lawcat-q", position="rope")
    ids = torch.randint(0, config.vocab_size, (1, 90))
    with torch.inference_mode():
        expected, _ = decoder(ids)
    call = Caller(build_openvino(config, weights), 1)
    for start, end in ((0, 80), (80, 89), (89, 90)):
        logits = call(ids[:, start:end])
    assert np.abs(logits[0, 0] - expected[0, -1].numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("layout", ["lawcat-q", "lawcat-kv"])
@pytest.mark.parametrize("ablation", ["conv", "normaliser"])
def test_ablations(ablation: str, layout: str, tiny_checkpoint: Callable[..., Path]) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("qwen3"), layout, **{ablation: False})
    ids = torch.randint(0, config.vocab_size, (2, 70))
    mask = np.ones((2, 70), np.int64)
    mask[0, :9] = 0
    with torch.inference_mode():
        expected, _ = decoder(ids, mask=torch.from_numpy(mask))
    call = Caller(build_openvino(config, weights), 2)
    for start, end in ((0, 66), (66, 69), (69, 70)):
        logits = call(ids[:, start:end], mask[:, start:end])
        assert np.abs(logits[:, 0] - expected[:, end - 1].numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("window", [1, 16, 100])
def test_windows_of_another_size_and_scale(
    window: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    config, weights, _ = model_of(tiny_checkpoint("qwen3"), "lolcats")
    options = LolcatsConfig(window=window, common_scale=False)
    config = config.with_mixers(config.mixers, lolcats=options)
    ids = torch.randint(0, config.vocab_size, (1, 150))
    with torch.inference_mode():
        expected, _ = Decoder.from_store(config, weights)(ids, form="parallel")
    call = Caller(build_openvino(config, weights), 1)
    for start, end in ((0, 140), (140, 149), (149, 150)):
        logits = call(ids[:, start:end])
        assert np.abs(logits[0, 0] - expected[0, end - 1].numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("weights_format", ["fp32", "fp16", "int8", "int4"])
def test_written_formats_stay_close(
    weights_format: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), "hybrid")
    write_openvino(config, weights, tmp_path, weights_format=weights_format, group_size=16)
    model = ov.Core().read_model(tmp_path / "openvino_model.xml")
    ids = torch.randint(0, config.vocab_size, (1, 100))
    with torch.inference_mode():
        expected, _ = decoder(ids)
    reference, got = expected[0, -1].numpy(), Caller(model, 1)(ids)[0, 0]
    error = np.sqrt(np.mean((got - reference) ** 2) / np.mean(reference**2))
    assert error <= {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.08, "int4": 0.8}[weights_format]


def test_narrow_formats_keep_the_mixer_precise(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Matrices become 4 and 8 bits; gate, convolution and feature map stay fp32."""
    config, weights, _ = model_of(tiny_checkpoint("llama"), "lawcat-q")
    write_openvino(config, weights, tmp_path, weights_format="int4", group_size=16)
    model = ov.Core().read_model(tmp_path / "openvino_model.xml")
    kinds = {
        node.get_friendly_name(): node.get_element_type().get_type_name()
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    }
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "i4"
    assert kinds["model.embed_tokens.weight"] == "i8"
    assert kinds["model.layers.0.self_attn.gate_up.weight"] == "f32"
    maps = [n for n in model.get_ops() if n.get_friendly_name().endswith(".feature_map")]
    convolutions = [n for n in model.get_ops() if n.get_type_name() == "GroupConvolution"]
    assert len(maps) == len(convolutions) == 3
    sources = {n.input_value(1).get_node().get_type_name() for n in maps + convolutions}
    assert sources == {"Constant"}


def test_state_names_and_shapes(tiny_checkpoint: Callable[..., Path]) -> None:
    """What the GenAI pipelines recognise: dynamic batch, rank 3 for conv, rank 4 for the rest."""
    config, weights, _ = model_of(tiny_checkpoint("llama"), "hybrid")
    model = build_openvino(config, weights)
    names = {
        v.info.variable_id: list(v.info.data_shape.get_max_shape()) for v in model.get_variables()
    }
    assert set(names) == {
        "past_key_values.0.key",
        "past_key_values.0.value",
        "cache_params.past.conv.1",
        "cache_params.past.ssm.1",
        "past_key_values.2.key",
        "past_key_values.2.value",
    }
    assert len(names["cache_params.past.conv.1"]) == 3
    assert names["cache_params.past.ssm.1"][1:] == [2, 16, 24]


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_attention_stays_fused(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """The plug-in keeps keys and values inside the attention node if it recognises the form."""
    config, weights, _ = model_of(tiny_checkpoint(family), "softmax")
    compiled = ov.Core().compile_model(build_openvino(config, weights), "CPU", PRECISE)
    nodes = compiled.get_runtime_model().get_ops()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
    assert sum("ScaledDotProductAttention" in kind for kind in kinds) == config.num_layers
    assert not any(kind in ("Softmax", "CumSum") for kind in kinds)
