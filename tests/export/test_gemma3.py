"""Windows, and attention within images, in the graphs of both engines against the torch decoder."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch

from edgekit.bundle import FRESH_STATES
from edgekit.export.states import state_records
from edgekit.export.to_onnx import write_onnx
from edgekit.export.to_openvino import build_openvino
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder
from edgekit.models.spin import SpinConfig
from edgekit.models.weights import WeightStore
from edgekit.runtime.state import state_shape
from edgekit.testing import scrambled_decoder

LAYOUTS = {
    "softmax": (("softmax",) * 3, "q_head"),
    "hybrid": (("softmax", "lawcat", "softmax"), "kv_head"),
}
SPIN = SpinConfig(suppress=2, alpha=0.25)
MAX_ABS = 1e-4
WINDOW_PORT = 10  # of OpenVINO's paged attention
PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
Engine = Callable[[DecoderConfig, WeightStore], Any]
Checkpoint = Callable[..., Path]


class OpenVino:
    """One infer request."""

    def __init__(self, config: DecoderConfig, weights: WeightStore) -> None:
        model = build_openvino(config, weights)
        self.names = {name for port in model.inputs for name in port.get_names()}
        self.compiled = ov.Core().compile_model(model, "CPU", PRECISE)
        self.request = self.compiled.create_infer_request()

    def __call__(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        """The last position's logits `[B, V]`; `feed` has more than the graph reads."""
        return self.request.infer({n: feed[n] for n in self.names})["logits"][:, -1].copy()


class Onnx:
    """One session; every call allocates its states."""

    def __init__(self, directory: Path, config: DecoderConfig, weights: WeightStore) -> None:
        self.session = onnxruntime.InferenceSession(directory / "model.onnx")
        self.names = {port.name for port in self.session.get_inputs()}
        self.records = state_records(config)
        self.states: dict[str, np.ndarray] = {}

    def __call__(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        """The last position's logits `[B, V]`; `feed` has more than the graph reads."""
        for record in self.records:
            empty = np.zeros(state_shape(record, "onnx", len(feed["input_ids"]), 0), np.float32)
            past = self.states.get(record.onnx[1])
            feed[record.onnx[0]] = empty if past is None else past[feed["beam_idx"]]
        outputs = [record.onnx[1] for record in self.records]
        read = {name: array for name, array in feed.items() if name in self.names}
        logits, *after = self.session.run(["logits", *outputs], read)
        self.states = dict(zip(outputs, after, strict=True))
        return logits[:, -1]


@pytest.fixture(params=["openvino", "contrib", "portable"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    if request.param == "openvino":
        return OpenVino

    def opened(config: DecoderConfig, weights: WeightStore) -> Onnx:
        write_onnx(config, weights, tmp_path, ops=request.param)
        return Onnx(tmp_path, config, weights)

    return opened


def fed(
    given: torch.Tensor,
    image: torch.Tensor,
    so_far: torch.Tensor,
    beam: list[int] | None = None,
) -> dict[str, np.ndarray]:
    """One call's inputs: tokens or embeddings, where images lie, the mask of all columns so far."""
    positions = (so_far.cumsum(dim=1) - 1).clamp_min(0)[:, -given.shape[1] :]
    return {
        "input_ids": given.numpy(),
        "inputs_embeds": given.numpy(),
        "attention_mask": so_far.numpy(),
        "position_ids": positions.numpy(),
        "spin_image_mask": image.long().numpy(),
        "beam_idx": np.array(range(len(given)) if beam is None else beam, np.int32),
    }


def model_of(
    checkpoint: Path, layout: str, **changes: Any
) -> tuple[DecoderConfig, WeightStore, Decoder]:
    config, weights, _ = scrambled_decoder(checkpoint, *LAYOUTS[layout])
    config = replace(config, **changes)
    return config, weights, Decoder.from_store(config, weights)


def two_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and where images lie: an image of 30 is longer than the window of 21."""
    ids, image = torch.randint(0, 320, (2, 128)), torch.zeros(2, 128, dtype=torch.bool)
    image[0, 3:20] = image[0, 60:90] = True
    image[1, 100:120] = True
    return ids, image


@torch.inference_mode()
def reference(decoder: Decoder, given: torch.Tensor, image: torch.Tensor) -> np.ndarray:
    return decoder(given, image=image, form="parallel")[0].numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spin", [None, SPIN], ids=["plain", "spin"])
def test_the_tokens_of_an_image_see_each_other(
    layout: str, spin: SpinConfig | None, engine: Engine, tiny_checkpoint: Checkpoint
) -> None:
    causal = model_of(tiny_checkpoint("gemma3_text"), layout, spin=spin)[2]
    config, weights, decoder = model_of(
        tiny_checkpoint("gemma3_text"), layout, spin=spin, image_attention="bidirectional"
    )
    ids, image = two_rows()
    expected = reference(decoder, ids, image)
    assert np.abs(expected - reference(causal, ids, image))[:, -1].max() > 100 * MAX_ABS
    call, end = engine(config, weights), 0
    for size in (3, 22, 35, 65, 1, 1, 1):  # no image is cut
        part = slice(end, end + size)
        end += size
        logits = call(fed(ids[:, part], image[:, part], torch.ones_like(ids[:, :end])))
        assert np.abs(logits - expected[:, end - 1]).max() <= MAX_ABS, (size, end)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_in_padded_rows_and_beams(
    layout: str, engine: Engine, tiny_checkpoint: Checkpoint
) -> None:
    config, weights, decoder = model_of(
        tiny_checkpoint("gemma3_text"), layout, spin=SPIN, image_attention="bidirectional"
    )
    (ids, image), rows = two_rows(), [1, 0, 1]
    mask = torch.ones_like(ids)[:, :121]
    mask[1, :95] = 0
    call = engine(config, weights)
    call(fed(ids[:, :120], image[:, :120], mask[:, :120]))
    logits = call(fed(ids[rows, 120:121], image[rows, 120:121], mask[rows], rows))
    for logit, row in zip(logits, rows, strict=True):
        start = int((mask[row] == 0).sum())
        alone = ids[row : row + 1, start:121], image[row : row + 1, start:121]
        assert np.abs(logit - reference(decoder, *alone)[0, -1]).max() <= MAX_ABS


def test_a_window_that_holds_no_image_gates_nothing(
    engine: Engine, tiny_checkpoint: Checkpoint
) -> None:
    """The last layer's gate reaches its own position alone; it slides, and sees 21 tokens."""
    spin = replace(SPIN, layers=(2, 3))
    config, weights, decoder = model_of(tiny_checkpoint("gemma3_text"), "softmax", spin=spin)
    plain = model_of(tiny_checkpoint("gemma3_text"), "softmax")[2]
    ids, image = torch.randint(0, 320, (1, 60)), torch.zeros(1, 60, dtype=torch.bool)
    image[:, 3:20] = True
    expected, ungated = reference(decoder, ids, image), reference(plain, ids, image)
    call = engine(config, weights)
    for start, end in ((0, 40), (40, 41), (41, 60)):  # position 39 still sees an image token
        part = slice(start, end)
        logits = call(fed(ids[:, part], image[:, part], torch.ones_like(ids[:, :end])))
        assert np.abs(logits - expected[:, end - 1]).max() <= MAX_ABS
        gated = np.abs(logits - ungated[:, end - 1]).max() > 10 * MAX_ABS
        assert gated == (end == 40)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_with_a_flag_channel(layout: str, tiny_checkpoint: Checkpoint) -> None:
    config, weights, decoder = model_of(
        tiny_checkpoint("gemma3_text"), layout, reads="embeddings", image_attention="bidirectional"
    )
    x, image = torch.randn(2, 128, config.hidden_size), two_rows()[1]
    flagged = torch.cat((x, image[..., None].float()), dim=2)
    call = OpenVino(replace(config, image_flag=True), weights)
    assert "spin_image_mask" not in call.names
    logits = call(fed(flagged, image, torch.ones_like(image).long()))
    assert np.abs(logits - reference(decoder, x, image)[:, -1]).max() <= MAX_ABS


@pytest.mark.parametrize("spin", [None, SPIN], ids=["plain", "spin"])
def test_attention_stays_fused(spin: SpinConfig | None, tiny_checkpoint: Checkpoint) -> None:
    """One node per layer in the compiled graph, and no softmax of ours."""
    config, weights, _ = model_of(
        tiny_checkpoint("gemma3_text"), "softmax", spin=spin, image_attention="bidirectional"
    )
    runtime = OpenVino(config, weights).compiled.get_runtime_model()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in runtime.get_ops()]
    assert sum("ScaledDotProductAttention" in kind for kind in kinds) == 3
    assert not [kind for kind in kinds if "Softmax" in kind or "SoftMax" in kind]


def test_paged_attention_knows_the_windows(tiny_checkpoint: Checkpoint) -> None:
    """It drops the masks, and reads a window out of the one form of mask that it recognises."""
    config, weights, _ = model_of(tiny_checkpoint("gemma3_text"), "softmax")
    model = build_openvino(config, weights)
    transformations = importlib.import_module("openvino._offline_transformations")
    transformations.paged_attention_transformation(model)
    paged = [n for n in model.get_ordered_ops() if n.get_type_name() == "PagedAttentionExtension"]
    folded = ov.Model([node.input_value(WINDOW_PORT) for node in paged], [])
    windows = ov.Core().compile_model(folded, "CPU")([])
    assert [int(windows[i]) for i in range(3)] == [21, 0, 21]  # 0: all


@pytest.mark.parametrize("image_attention", ["causal", "bidirectional"])
def test_the_fused_operator_is_causal(
    image_attention: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Without it the cache is a concatenation, for which no buffer is past and present at once."""
    config, weights, _ = model_of(
        tiny_checkpoint("gemma3_text"), "hybrid", image_attention=image_attention
    )
    write_onnx(config, weights, tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    kinds, causal = {node.op_type for node in model.graph.node}, image_attention == "causal"
    assert "LinearAttention" in kinds
    assert ("GroupQueryAttention" in kinds) == causal
    assert [entry.key for entry in model.metadata_props] == [FRESH_STATES] * (not causal)
    genai = json.loads((tmp_path / "genai_config.json").read_text())
    assert genai["search"]["past_present_share_buffer"] == causal
