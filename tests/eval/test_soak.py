import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from edgekit.bundle import read_manifest
from edgekit.errors import UsageError
from edgekit.eval.soak import main
from edgekit.eval.soak_reference import check_origin, open_reference
from edgekit.eval.soak_walk import Route, logits_at
from edgekit.export.pipeline import convert
from edgekit.runtime import Session
from edgekit.runtime.session import Snapshot
from edgekit.testing import TOLERANCE, assert_close, write_tiny_student

SHORT = ("--tokens", "900", "--checkpoints", "3", "--threads", "1", "--engine", "openvino")
FEW = (*SHORT, "--sessions", "2")
DYING = """
import os, signal, sys
from edgekit.eval.soak import main
from edgekit.runtime import Session, model

class Dying(Session):
    calls = 0

    def append(self, ids, *rest):
        Dying.calls += 1
        if Dying.calls == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().append(ids, *rest)

model.Session = Dying
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def student(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_student(tmp_path_factory.mktemp("s") / "student", checkpoint, ("lawcat",) * 3)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `student`, fp32, for both engines."""
    out = tmp_path_factory.mktemp("b") / "bundle"
    convert(checkpoint, out, student=student, weights="fp32", verify=False, target="generic-x86")
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The river had been rising since noon. Nobody could remember such a spring. ")
    return path


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "soak.json").read_text())
    return found


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_a_recurrent_bundle_stays_as_it_was(
    engine: str,
    bundle: Path,
    checkpoint: Path,
    student: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    origin = ("--source", str(checkpoint), "--student", str(student), "--text", str(text))
    command = [str(bundle), *SHORT, "--engine", engine, *origin, "-o", str(out)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == result(out)
    assert [c["tokens"] for c in found["checkpoints"]] == [300, 600, 900]
    assert found["calls"] == [[172, 1], [1, 128]]
    assert found["reference"] == "PyTorch in fp64"
    assert all(0 < c["error"] < 1e-5 for c in found["checkpoints"])
    assert found["growth"] < 0.02
    assert found["failures"] == []
    assert (found["parallel"]["equal"], found["parallel"]["sessions"]) == (8, 8)
    assert (out / "soak.png").read_bytes().startswith(b"\x89PNG")
    # Again: nothing is read twice, so that even the seconds are the same.
    assert main(command) == 0
    assert result(out)["checkpoints"] == found["checkpoints"]
    assert "| 900 | 0 | " in capsys.readouterr().out


class Drifting(Session):
    """Its state changes a little with every call, as if it were kept in 8 bits."""

    def append(self, *given: Any) -> Any:
        logits = super().append(*given)
        self.restore(self._rounded(self.snapshot()))
        return logits

    @staticmethod
    def _rounded(state: Snapshot) -> Snapshot:
        for array in state.states.values():
            step = abs(array).max() / 127
            array[:] = np.round(array / step) * step
        return state


class Leaking(Session):
    """Keeps 256 kB of each call."""

    kept: ClassVar[list[np.ndarray]] = []

    def append(self, *given: Any) -> Any:
        self.kept.append(np.ones(32768))
        return super().append(*given)


class Confused(Session):
    """Reads other tokens where it is not alone."""

    def append(self, ids: Any, *rest: Any) -> Any:
        alone = threading.current_thread() is threading.main_thread()
        return super().append(ids if alone else np.asarray(ids)[::-1] // 2, *rest)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Drifting, "logits drifted by"),
        (Leaking, "memory grew by"),
        (Confused, "0 of 2 parallel sessions wrote what one alone wrote; allowed: all"),
    ],
)
def test_what_changes_is_noticed(
    broken: type[Session],
    message: str,
    bundles: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgekit.runtime.model.Session", broken)
    assert main([str(bundles("lawcat")), *FEW, "-o", str(tmp_path / "out")]) == 1
    Leaking.kept.clear()
    assert f"soak: error: {message}" in capsys.readouterr().err
    (failure,) = result(tmp_path / "out")["failures"]
    assert failure.startswith(message)


# The walk takes 387 calls, the three sessions after it 66 each.
@pytest.mark.parametrize("call", [200, 387 + 3 * 66 + 2], ids=["walk", "reference"])
def test_a_killed_soak_goes_on(
    call: int, bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [str(bundles("lawcat")), *FEW, "-o"]
    assert main([*command, str(whole)]) == 0
    dying = [sys.executable, "-P", "-c", DYING, str(call), *command, str(killed)]
    assert subprocess.run(dying, check=False, capture_output=True).returncode == -9
    assert not (killed / "soak.json").exists()
    assert main([*command, str(killed)]) == 0
    for folder in ("walk", "blocks"):
        for tokens in (300, 600, 900):
            expected = logits_at(whole / folder, tokens)
            assert (logits_at(killed / folder, tokens) == expected).all(), (folder, tokens)
        assert len(list((killed / folder).glob("state-*"))) == 1
    errors = [[c["error"] for c in result(out)["checkpoints"]] for out in (whole, killed)]
    assert errors[0] == errors[1]
    runs = [c["run"] for c in result(killed)["checkpoints"]]
    assert runs == ([0, 1, 1] if call == 200 else [0, 0, 0])
    capsys.readouterr()
    assert main([*command, str(killed), "--block", "64"]) == 2
    assert "begun with other settings (calls: " in capsys.readouterr().err


def test_the_fp64_reference_goes_on_from_its_file(
    checkpoint: Path, student: Path, tmp_path: Path
) -> None:
    ids = np.random.default_rng(3).integers(3, 320, 900)
    begun = open_reference(str(checkpoint), str(student), threads=None)
    begun.append(ids[:600])
    begun.save(tmp_path / "state")
    expected = begun.append(ids[600:])
    again = open_reference(str(checkpoint), str(student), threads=None)
    again.load(tmp_path / "state")
    assert (again.append(ids[600:]) == expected).all()
    at_once = open_reference(str(checkpoint), str(student), threads=None).append(ids)
    assert_close("logits", at_once, expected, ratio=TOLERANCE["float32"])


def test_rounded_weights_are_compared_with_themselves(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = tmp_path / "int8", tmp_path / "out"
    convert(checkpoint, bundle, mixer="lawcat", weights="int8", verify=False, formats=("openvino",))
    command = [str(bundle), *FEW, "-o", str(out)]
    assert main(command) == 0
    assert "against the same bundle read in blocks: " in capsys.readouterr().out
    assert result(out)["allowed_error"] is None
    assert main([*command, "--source", str(checkpoint)]) == 2
    assert "this bundle has int8 weights, which differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1000"], "tokens 1000 given for 3 checkpoints; allowed: a multiple"),
        (["--checkpoints", "1"], "checkpoints 1 given; allowed: 2 or more"),
        (["--block", "0"], "block 0 given; allowed: 1 or more"),
        (["--sessions", "0"], "sessions 0 given; allowed: 1 or more"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
    ids=["tokens", "checkpoints", "block", "sessions", "text"],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(bundle), *SHORT, *arguments, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_softmax_layers_and_other_models_are_refused(
    bundles: Callable[[str], Path],
    bundle: Path,
    checkpoint: Path,
    student: Path,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ("-o", str(tmp_path / "out"))
    assert main([str(bundles("hybrid")), "--tokens", "9000", *out]) == 2
    assert "9000 tokens asked for, but the softmax layers of this bundle see 4096" in (
        capsys.readouterr().err
    )
    assert main([str(checkpoint), *out]) == 1
    assert "edgekit.json" in capsys.readouterr().err
    assert main([str(bundle), *SHORT, "--source", str(checkpoint), *out]) == 2
    assert "3 softmax layers given, but this bundle has 3 lawcat layers; give the student" in (
        capsys.readouterr().err
    )
    other = tiny_checkpoint("llama", seed=1)
    with pytest.raises(UsageError, match="given, but this bundle was made from"):
        check_origin(read_manifest(bundle), str(other), None)
    assert not (tmp_path / "out").exists()


def test_every_stretch_is_fed_alike() -> None:
    route = Route(tokens=10_000, checkpoints=5)
    assert route.calls == ((512, 3), (336, 1), (1, 128))
    spans = [span for done in range(5) for span in route.spans(done)]
    assert spans[0] == (0, 512)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1] == (9999, 10_000)
    assert Route(tokens=100, checkpoints=2, block=7).calls == ((7, 7), (1, 1))
    assert Route(tokens=100, checkpoints=2).calls == ((1, 50),)
