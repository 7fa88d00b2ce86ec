"""Positions of three axes in the graphs of both engines, against the torch decoder."""

import functools
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino as ov
import pytest
import torch

from edgekit.export.states import input_names, state_records
from edgekit.export.to_onnx import write_onnx
from edgekit.export.to_openvino import build_openvino
from edgekit.models.config import DecoderConfig, RopeConfig
from edgekit.models.decoder import Decoder
from edgekit.models.spin import SpinConfig
from edgekit.models.weights import MemoryStore, OverlayStore, WeightStore
from edgekit.runtime.positions import following_positions, mrope_positions
from edgekit.runtime.state import state_shape
from edgekit.testing_vlm import IMAGE, language_of, tiny_vlm

MAX_ABS = 1e-4
PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
LAYOUTS = {
    "softmax": ("softmax", "softmax"),
    "hybrid": ("softmax", "lawcat"),
    "lolcats": ("lolcats", "softmax"),
}
SPINS = {
    "plain": None,
    "spin": SpinConfig(suppress=2, alpha=0.25, layers=(0, 1)),
    "spin-last": SpinConfig(suppress=2, alpha=0.25, layers=(0, 1), queries="last"),
}
# Two images in the first row, one in the second.
GRIDS = np.array([[1, 4, 6], [1, 10, 2], [1, 6, 6]])
ONE_AXIS = RopeConfig()
STEPS = 3
Feed = dict[str, np.ndarray]


def run_openvino(config: DecoderConfig, weights: WeightStore, feeds: list[Feed]) -> list[Any]:
    """Logits of the last position of each call."""
    model = build_openvino(config, weights)
    request = ov.Core().compile_model(model, "CPU", PRECISE).create_infer_request()
    names = (*input_names(config), "beam_idx")
    return [request.infer({n: feed[n] for n in names})["logits"][:, -1].copy() for feed in feeds]


def run_onnx(config: DecoderConfig, weights: WeightStore, feeds: list[Feed], ops: str) -> list[Any]:
    """The same; each call allocates its states."""
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(config, weights, Path(folder), ops=ops)
        session = onnxruntime.InferenceSession(Path(folder) / "model.onnx")
    outputs, found = [value.name for value in session.get_outputs()], []
    records = state_records(config)
    states = {r.onnx[0]: np.zeros(state_shape(r, "onnx", 2, 0), np.float32) for r in records}
    for feed in feeds:
        given = {name: feed[name] for name in input_names(config)}
        after = dict(zip(outputs, session.run(outputs, given | states), strict=True))
        states = {record.onnx[0]: after[record.onnx[1]] for record in records}
        found.append(after["logits"][:, -1])
    return found


ENGINES: dict[str, Callable[[DecoderConfig, WeightStore, list[Feed]], list[Any]]] = {
    "openvino": run_openvino,
    "contrib": functools.partial(run_onnx, ops="contrib"),
    "portable": functools.partial(run_onnx, ops="portable"),
}


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask: two images in the first row; padding, then one image in the second."""
    sizes = [int(grid.prod()) // 4 for grid in GRIDS]
    first = [5, 6, 7, *[IMAGE] * sizes[0], 8, *[IMAGE] * sizes[1], 9, 10]
    second = [11, *[IMAGE] * sizes[2], 12, 13]
    padding = len(first) - len(second)
    ids = np.array([first, [0] * padding + second])
    mask = np.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask


def calls(config: DecoderConfig) -> list[Feed]:
    """A prompt, and tokens one by one."""
    ids, mask = prompts()
    positions, delta = mrope_positions(ids, GRIDS, IMAGE, mask=mask)
    feeds = []
    for step in range(1 + STEPS):
        if step:
            ids, mask = np.full((2, 1), 20 + step), np.pad(mask, ((0, 0), (0, 1)), mode="edge")
            positions = following_positions(mask.sum(axis=1) - 1, delta)
        feeds.append(
            {
                "inputs_embeds": np.random.randn(*ids.shape, config.hidden_size).astype("f"),  # noqa: NPY002
                "attention_mask": mask,
                "position_ids": positions,
                "spin_image_mask": (ids == IMAGE).astype(np.int64),
                "beam_idx": np.arange(2, dtype=np.int32),
            }
        )
    return feeds


def expected(config: DecoderConfig, weights: WeightStore, feeds: list[Feed]) -> list[Any]:
    decoder, state, found = Decoder.from_store(config, weights), None, []
    for feed in feeds:
        given = {name: torch.tensor(array) for name, array in feed.items()}
        with torch.inference_mode():
            logits, state = decoder(
                given["inputs_embeds"],
                mask=given["attention_mask"],
                positions=given["position_ids"],
                image=given["spin_image_mask"].bool(),
                state=state,
            )
        found.append(logits[:, -1].numpy())
    return found


@pytest.mark.parametrize(
    ("layout", "spin"),
    [(layout, spin) for layout in ("softmax", "hybrid") for spin in SPINS] + [("lolcats", "plain")],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_prompt_and_decoding(engine: str, layout: str, spin: str) -> None:
    config, weights = language_of(tiny_vlm("qwen2-vl"), LAYOUTS[layout])
    sharp = {n: 6 * weights.tensor(n) for n in weights if n.endswith("q_proj.weight")}
    weights = OverlayStore(MemoryStore(sharp), weights)
    config = replace(config, reads="embeddings", spin=SPINS[spin])
    feeds = calls(config)
    reference = expected(config, weights, feeds)
    if spin == "plain":
        one_axis = [{**feed, "position_ids": feed["position_ids"][[0] * 3]} for feed in feeds]
        other = expected(config, weights, one_axis)
    else:
        other = expected(replace(config, spin=None), weights, feeds)
    assert np.abs(other[-1] - reference[-1]).max() > 100 * MAX_ABS
    found = ENGINES[engine](config, weights, feeds)
    for mine, theirs in zip(found, reference, strict=True):
        assert np.abs(mine - theirs).max() <= MAX_ABS


def test_layers_without_rotation_have_no_such_input() -> None:
    config, weights = language_of(tiny_vlm("qwen2-vl"), ("lawcat", "lawcat"))
    model = build_openvino(config, weights)
    names = {name for port in model.inputs for name in port.get_names()}
    assert names == {"input_ids", "attention_mask", "beam_idx"}


def test_attention_stays_fused_and_tables_are_shared() -> None:
    """Three axes cost one gather and one transpose per call, however many layers there are."""
    config, weights = language_of(tiny_vlm("qwen2-vl"))
    three, one = (
        kinds(build_openvino(found, weights)) for found in (config, replace(config, rope=ONE_AXIS))
    )
    assert three["ScaledDotProductAttention"] == 2
    assert three - one == {"Gather": 1, "Transpose": 1}


def kinds(model: ov.Model) -> Counter[str]:
    """The nodes of the compiled graph that compute something."""
    runtime = ov.Core().compile_model(model, "CPU", PRECISE).get_runtime_model()
    every = (node.get_rt_info()["layerType"].astype(str) for node in runtime.get_ops())
    return Counter(kind for kind in every if kind != "Const")
