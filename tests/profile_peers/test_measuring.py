"""Rows, failures and noise, with a peer that fails when it is told to; the real ones are `peer`."""

import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.errors import EngineError, UsageError
from edgekit.peers import PEERS, Missing, PeerReport, check_installed, measure_peer
from edgekit.peers.registry import Package
from edgekit.runtime.workload import Options

OPTIONS = Options(prompts=(4, 9), depths=(6, 0, 6), tokens=5, repeat=2, threads=3)
SLEEPER = """
    import os, signal, time
    from edgekit.peers.report import Setup
    from edgekit.peers.worker import serve

    print("a library's chatter")
    os.write(1, b'{"missing": 1}')

    class Sleeper:
        def __init__(self, request):
            self.setup = Setup(
                threads=request.threads, context=CONTEXT, trained_context=7, settings={"a": "b"}
            )
            AT_LOADING

        def encode(self, text):
            return list(text.encode())

        def prefill(self, ids):
            time.sleep(1e-3)
            return 1e-3 * len(ids), 1.0

        def decode(self, ids, count):
            if len(ids) == 6:
                AT_DEPTH
            return [1e-3] * (count - 1) + [6e-3]

    serve(Sleeper)
"""
Measured = Callable[..., PeerReport]


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """`sleeper(at_depth="raise ...")` measures a process of that behaviour."""
    model = tmp_path / "model.GGUF"
    model.write_bytes(b"12345")
    package = Package(
        runner="sleeper_peer", module="numpy", distributions=("numpy",), reads="a .gguf file"
    )
    monkeypatch.setitem(PEERS, "sleeper", package)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def measured(
        context: str = "None",
        at_loading: str = "pass",
        at_depth: str = "pass",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> PeerReport:
        text = textwrap.dedent(SLEEPER).replace("CONTEXT", context)
        text = text.replace("AT_LOADING", at_loading).replace("AT_DEPTH", at_depth)
        (tmp_path / "sleeper_peer.py").write_text(text, encoding="utf-8")
        return measure_peer("sleeper", model, OPTIONS, progress)

    return measured


def test_every_row_once_by_its_medians(sleeper: Measured) -> None:
    steps: list[tuple[str, int, int]] = []
    report = sleeper(progress=lambda *step: steps.append(step))
    assert [row.tokens for row in report.prefill] == [4, 9]
    assert all(row.tokens_per_second.median == pytest.approx(1e3) for row in report.prefill)
    assert report.prefill[1].ttft_ms.samples == (1e3, 1e3)
    assert [row.depth for row in report.decode] == [0, 6]
    assert report.decode[0].tokens_per_second.median == pytest.approx(500)
    assert (report.decode[0].p50_ms, report.decode[0].p99_ms) == (1, 6)
    assert report.missing == ()
    assert [number for _, number, _ in steps] == [0, 1, 2, 3]
    assert {count for *_, count in steps} == {4}


def test_what_is_known_besides(sleeper: Measured) -> None:
    report = sleeper()
    assert (report.peer, report.model, report.model_bytes) == ("sleeper", "model.GGUF", 5)
    assert report.setup is not None
    assert (report.setup.threads, report.setup.trained_context) == (3, 7)
    assert report.setup.settings == {"a": "b"}
    assert list(report.versions) == ["numpy"]
    assert report.peak_rss is None or report.peak_rss > 10e6


def test_a_row_that_fails_is_missing_and_the_next_is_measured(sleeper: Measured) -> None:
    report = sleeper(at_depth="raise RuntimeError('two\\n lines')")
    assert report.missing == (Missing(row="depth", tokens=6, note="two lines"),)
    assert [row.depth for row in report.decode] == [0]


def test_a_row_beyond_the_context_is_missing(sleeper: Measured) -> None:
    report = sleeper(context="10")
    note = "12 tokens do not fit in its context of 10"
    assert report.missing == (Missing(row="depth", tokens=6, note=note),)
    assert [row.tokens for row in report.prefill] == [4, 9]


def test_a_killed_process_leaves_what_it_had(sleeper: Measured) -> None:
    report = sleeper(at_depth="os.kill(os.getpid(), signal.SIGKILL)")
    note = "its process was ended by SIGKILL; out of memory?"
    assert report.missing == (Missing(row="depth", tokens=6, note=note),)
    assert [row.depth for row in report.decode] == [0]
    assert report.peak_rss is None


def test_a_process_killed_while_it_loads_owes_every_row(sleeper: Measured) -> None:
    report = sleeper(at_loading="os.kill(os.getpid(), signal.SIGSEGV)")
    rows = [(row.row, row.tokens) for row in report.missing]
    assert rows == [("prompt", 4), ("prompt", 9), ("depth", 0), ("depth", 6)]
    assert {row.note for row in report.missing} == {"its process was ended by SIGSEGV"}
    assert report.setup is None


def test_a_model_that_does_not_load_is_one_line(sleeper: Measured) -> None:
    with pytest.raises(EngineError, match=r"peer sleeper: .*model\.GGUF: no such tensor$"):
        sleeper(at_loading="raise ValueError('no such tensor')")


def test_an_interrupted_measurement_leaves_no_process(sleeper: Measured, tmp_path: Path) -> None:
    def stop(name: str, number: int, count: int) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "pid"
    with pytest.raises(KeyboardInterrupt):
        sleeper(at_loading=f"open({str(file)!r}, 'w').write(str(os.getpid()))", progress=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text(encoding="ascii")), 0)


def test_unknown_peer() -> None:
    with pytest.raises(UsageError, match="peer 'vllm' given; allowed: llama-cpp, openvino-genai"):
        check_installed("vllm")


@pytest.mark.parametrize("name", PEERS)
def test_peer_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PEERS[name].module, None)
    with pytest.raises(EngineError, match=f"pip install {PEERS[name].distributions[0]}"):
        measure_peer(name, "nowhere", OPTIONS)


@pytest.mark.parametrize("name", PEERS)
def test_file_that_is_no_model_of_the_peer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.peers.measuring.check_installed", lambda name: None)
    with pytest.raises(UsageError, match=f"peer {name}: .* given; allowed: {PEERS[name].reads}"):
        measure_peer(name, tmp_path, OPTIONS)
