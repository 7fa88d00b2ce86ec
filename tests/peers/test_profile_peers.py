"""The peers of `edgekit profile` for real: every row is measured, and on the text it should be."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.peers import PEERS, measure_peer
from edgekit.peers.worker import Request
from edgekit.runtime.workload import Options
from edgekit.sources.builtin import locate_built_in

pytestmark = pytest.mark.peer

COUNT = 8
Model = Callable[[str], Path]


@pytest.fixture
def model(bundle: Callable[[str], Path]) -> Model:
    """A softmax model for the peer; llama.cpp needs its package, which `make` does not install."""

    def find(name: str) -> Path:
        if name != "llama-cpp":
            return bundle("softmax")
        pytest.importorskip("llama_cpp")
        return locate_built_in("smollm2-135m-instruct")

    return find


@pytest.fixture
def peer(model: Model) -> Callable[..., Any]:
    """`peer("ort-genai", 40)` is the peer in this process, for a text of 40 tokens."""

    def make(name: str, length: int) -> Any:
        request = Request(
            model=str(model(name)),
            prompts=(),
            depths=(length,),
            tokens=COUNT,
            repeat=1,
            threads=1,
        )
        kind = {"llama-cpp": "LlamaCpp", "ort-genai": "OrtGenai"}[name]
        return getattr(importlib.import_module(PEERS[name].runner), kind)(request)

    return make


@pytest.mark.parametrize("name", PEERS)
def test_every_row(name: str, model: Model) -> None:
    options = Options(prompts=(16, 33), depths=(0, 24), tokens=COUNT, repeat=2, threads=1)
    report = measure_peer(name, model(name), options)
    assert report.missing == ()
    assert [row.tokens for row in report.prefill] == [16, 33]
    assert [row.depth for row in report.decode] == [0, 24]
    for prompt in report.prefill:
        assert prompt.ttft_ms.low >= 1e3 * prompt.tokens / prompt.tokens_per_second.high
    for row in report.decode:
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert len(row.tokens_per_second.samples) == 2
    assert report.setup is not None
    assert report.setup.threads == 1
    assert report.peak_rss is None or report.peak_rss > report.model_bytes


def test_decoding_goes_on_greedily_after_the_text(
    peer: Callable[..., Any], greedy: Any, prompts: Any
) -> None:
    """Before, it read the text's beginning and decoded there: rewinding leaves nothing behind."""
    running = peer("ort-genai", 21)
    running.decode(prompts[1][:9], COUNT)
    assert len(running.decode(prompts[1], COUNT)) == COUNT
    (expected,) = greedy("softmax", "onnx", prompts[1:], COUNT + 1)
    written = running._generator.get_sequence(0)
    assert written.tolist() == [*prompts[1].tolist(), *expected]


def test_llama_cpp_decodes_the_same_after_cutting_back(peer: Callable[..., Any]) -> None:
    again, fresh = peer("llama-cpp", 40), peer("llama-cpp", 40)
    ids = np.resize(again.encode("The miller counted his sacks twice, and "), 40)
    again.prefill(ids)
    again.decode(ids[:7], COUNT)
    for one in (again, fresh):
        one.decode(ids, COUNT)
    written = [one._llama.input_ids[: one._llama.n_tokens].tolist() for one in (again, fresh)]
    assert written[0] == written[1]
    assert written[0][:40] == ids.tolist()
    assert len(written[0]) == 40 + COUNT


def test_ort_genai_does_not_go_beyond_the_context(model: Model) -> None:
    options = Options(prompts=(600, 16), depths=(), repeat=1, threads=1)
    report = measure_peer("ort-genai", model("ort-genai"), options)
    assert [row.tokens for row in report.prefill] == [16]
    (missing,) = report.missing
    assert (missing.row, missing.tokens) == ("prompt", 600)
    assert missing.note == "601 tokens do not fit in its context of 512"


def test_ort_genai_says_that_a_recurrent_model_is_not_rewound(
    bundle: Callable[[str], Path],
) -> None:
    options = Options(prompts=(16,), depths=(24,), tokens=COUNT, repeat=1, threads=1)
    report = measure_peer("ort-genai", bundle("q_head"), options)
    assert [row.tokens for row in report.prefill] == [16]
    assert "rewound" in report.missing[0].note


def test_openvino_genai_reads_a_recurrent_model_too(bundle: Callable[[str], Path]) -> None:
    options = Options(prompts=(16,), depths=(24,), tokens=COUNT, repeat=1, threads=1)
    report = measure_peer("openvino-genai", bundle("q_head"), options)
    assert report.missing == ()
