"""Converting is timed beside Optimum's own command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.export.beside_optimum import main

pytestmark = pytest.mark.peer
Checkpoint = Callable[..., Path]


def test_three_ways_of_converting_are_timed(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    model = str(tiny_checkpoint("llama"))
    assert main([model, "-o", str(out), "--repeat", "1", "--json"]) == 0
    optimum, same, whole = json.loads(capsys.readouterr().out)
    assert "optimum-cli" in optimum["command"][0]
    assert same["command"][: len(whole["command"])] == whole["command"]
    for ways in (optimum, same, whole):
        assert len(ways["seconds"]) == len(ways["peak_bytes"]) == 1
        assert ways["seconds"][0] > 0.5
        assert ways["peak_bytes"][0] > 50e6
    assert not out.exists()


def test_what_cannot_be_timed_is_one_line(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert main(["smollm2-135m-instruct", "-o", str(out)]) == 2
    assert "no Hugging Face directory, which Optimum reads; write one" in capsys.readouterr().err
    assert main([str(tiny_checkpoint("llama")), "-o", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    assert main([str(broken), "-o", str(out)]) == 1
    assert "optimum-cli export openvino -m … failed: " in capsys.readouterr().err
