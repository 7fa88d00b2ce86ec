"""The graphs of fixed shapes say what the dynamic one says; all of it on OpenVINO's CPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch

from edgekit import targets
from edgekit.errors import UnsupportedError, UsageError
from edgekit.export.pipeline import convert
from edgekit.export.static_shapes import main, write_static
from edgekit.export.to_openvino import build_openvino
from edgekit.runtime.ov_shapes import fix_shapes
from edgekit.targets.schema import HINTS
from edgekit.testing import scrambled_decoder

Checkpoint = Callable[..., Path]
CHUNK, MAX_ABS = 16, 1e-4
PRECISE = {"INFERENCE_PRECISION_HINT": "f32"}
LAYOUTS = {
    "lawcat-q": ("lawcat", "q_head"),
    "lawcat-kv": ("lawcat", "kv_head"),
    "lolcats": ("lolcats", "q_head"),
}


class Graph:
    """One compiled graph with its states."""

    def __init__(self, model: ov.Model) -> None:
        self._names = {name for port in model.inputs for name in port.get_names()}
        self.request = ov.Core().compile_model(model, "CPU", PRECISE).create_infer_request()

    def __call__(self, ids: np.ndarray, start: int = 0, mask: np.ndarray | None = None) -> Any:
        """Logits `[1, 1, V]` of the last of `ids [1, T]`, which begin at position `start`."""
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids) if mask is None else mask,
            "position_ids": start + np.arange(ids.shape[1])[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return self.request.infer({n: feed[n] for n in self._names})["logits"].copy()

    def take_states(self, other: "Graph") -> None:
        given = {state.name: state.state for state in other.request.query_state()}
        for state in self.request.query_state():
            state.state = given[state.name]


def graphs(checkpoint: Path, layout: str) -> tuple[Graph, Graph, Graph]:
    """The dynamic graph, that of a chunk and that of a step."""
    mixer, sharing = LAYOUTS[layout]
    config, weights, _ = scrambled_decoder(checkpoint, (mixer,) * 3, sharing)
    dynamic, chunk, step = (build_openvino(config, weights) for _ in range(3))
    fix_shapes(chunk, CHUNK)
    fix_shapes(step, 1)
    for model in (chunk, step):
        assert "Loop" not in {node.get_type_name() for node in model.get_ops()}
        assert not any(port.get_partial_shape().is_dynamic for port in ports(model))
    return Graph(dynamic), Graph(chunk), Graph(step)


def ports(model: ov.Model) -> list[Any]:
    return [port for node in model.get_ops() for port in node.outputs()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_chunks_then_steps_equal_the_dynamic_graph(
    family: str, layout: str, tiny_checkpoint: Checkpoint
) -> None:
    dynamic, chunk, step = graphs(tiny_checkpoint(family), layout)
    ids = torch.randint(0, 320, (1, 3 * CHUNK + 5)).numpy()
    prompt = 3 * CHUNK
    for start in range(0, prompt, CHUNK):
        read = chunk(ids[:, start : start + CHUNK], start)
    expected = dynamic(ids[:, :prompt])
    assert np.abs(read - expected).max() <= MAX_ABS
    step.take_states(chunk)
    for place in range(prompt, ids.shape[1]):
        token = ids[:, place : place + 1]
        assert np.abs(step(token, place) - dynamic(token, place)).max() <= MAX_ABS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_of_any_length_begins_with_padding(
    layout: str, tiny_checkpoint: Checkpoint
) -> None:
    dynamic, chunk, _ = graphs(tiny_checkpoint("llama"), layout)
    length = 2 * CHUNK - 7
    ids = torch.randint(0, 320, (1, length)).numpy()
    padded = np.pad(ids, ((0, 0), (7, 0)))
    mask = np.pad(np.ones_like(ids), ((0, 0), (7, 0)))
    chunk(padded[:, :CHUNK], -7, mask[:, :CHUNK])
    assert np.abs(chunk(padded[:, CHUNK:], CHUNK - 7) - dynamic(ids)).max() <= MAX_ABS


def test_growing_caches_are_refused(tiny_checkpoint: Checkpoint) -> None:
    config, weights, _ = scrambled_decoder(
        tiny_checkpoint("llama"), ("lawcat", "softmax", "lawcat"), "q_head"
    )
    with pytest.raises(UnsupportedError, match=r"state past_key_values\.1\.(key|value) .*no fixed"):
        fix_shapes(build_openvino(config, weights), CHUNK)


@pytest.mark.parametrize("tokens", [0, 65])
def test_only_one_chunk_fits_a_call(tokens: int, tiny_checkpoint: Checkpoint) -> None:
    config, weights, _ = scrambled_decoder(tiny_checkpoint("llama"), ("lawcat",) * 3, "q_head")
    with pytest.raises(UsageError, match=f"{tokens} tokens a call given; allowed: 1 to 64"):
        fix_shapes(build_openvino(config, weights), tokens)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As made for an NPU: int4."""
    out = tmp_path_factory.mktemp("static") / "bundle"
    options = {"mixer": "lawcat", "formats": ("openvino",), "target": "intel-npu"}
    convert(tiny_checkpoint("llama"), out, verify=False, **options)
    return out


def test_bundle_for_an_npu_becomes_two_files_that_compile(bundle: Path, tmp_path: Path) -> None:
    assert main([str(bundle), "-o", str(tmp_path / "npu"), "--chunk", str(CHUNK)]) == 0
    core = ov.Core()
    dynamic = Graph(core.read_model(bundle / "openvino_model.xml"))
    chunk = Graph(core.read_model(tmp_path / "npu/openvino_chunk.xml"))
    step = Graph(core.read_model(tmp_path / "npu/openvino_step.xml"))
    ids = torch.randint(0, 320, (1, CHUNK + 1)).numpy()
    assert np.abs(chunk(ids[:, :CHUNK]) - dynamic(ids[:, :CHUNK])).max() <= MAX_ABS
    step.take_states(chunk)
    # Static and dynamic products round int4's activations apart.
    assert np.abs(step(ids[:, CHUNK:]) - dynamic(ids[:, CHUNK:])).max() <= 0.1


def test_command_refuses_in_one_line(
    bundle: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle), "-o", str(tmp_path / "npu"), "--chunk", "65"]) == 2
    assert "65 tokens a call given; allowed: 1 to 64" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "-o", str(tmp_path / "npu")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "npu").exists()


def test_softmax_bundle_is_refused_before_it_is_read(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    convert(tiny_checkpoint("llama"), tmp_path / "soft", formats=("openvino",), verify=False)
    with pytest.raises(UsageError, match=r"intel-npu cannot serve this bundle: .* softmax layers"):
        write_static(tmp_path / "soft", tmp_path / "npu")


@pytest.mark.parametrize("hint", HINTS)
def test_openvino_takes_every_hint_that_a_profile_may_have(
    hint: str, tiny_checkpoint: Checkpoint
) -> None:
    config, weights, _ = scrambled_decoder(tiny_checkpoint("llama"), ("lawcat",) * 3, "q_head")
    model = build_openvino(config, weights)
    for value in HINTS[hint]:
        target = replace(targets.load("generic-x86"), hints={hint: value})
        assert ov.Core().compile_model(model, target.device, target.hints) is not None
