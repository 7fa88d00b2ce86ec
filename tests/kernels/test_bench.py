"""The kernel benchmark: forms are proved before they are timed, and what it writes can be read."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from edgekit.kernels import bench
from edgekit.kernels.bench import main, measure
from edgekit.kernels.bench_cases import CASES, PROVING, Inputs, Results, Shape
from edgekit.kernels.dispatch import interpreted

TINY = Shape(name="tiny", batch=1, time=20, heads=1, width=16, vocabulary=37, hidden=8)


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUDGET", 0.0)  # the fewest repetitions


def test_it_writes_lines_a_table_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--cpu", "--op", "attention_mse", "-o", str(tmp_path)]) == 0
    rows = written(tmp_path)
    timed = {(row["shape"], row["backward"], row["form"]) for row in rows if row["seconds"]}
    assert {
        (shape, backward, "torch") for shape in ("D64", "D128") for backward in (False, True)
    } <= timed
    assert all(row["floor"] > 0 for row in rows)
    table = (tmp_path / "bench.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert "| attention_mse | D64 | forward and backward | torch |" in table
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_what_was_measured_outlives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Shape) -> None:
        raise KeyboardInterrupt

    case = CASES["spin_attention"]
    monkeypatch.setitem(CASES, "spin_attention", replace(case, forward=interrupted))
    with pytest.raises(KeyboardInterrupt):
        main(["--cpu", "--op", "attention_mse,spin_attention", "-o", str(tmp_path)])
    assert {row["op"] for row in written(tmp_path)} == {"attention_mse"}


def test_a_wrong_form_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["attention_mse"]

    def wrong(inputs: Inputs) -> Results:
        (loss,) = case.call(inputs)
        exact = inputs["y"].dtype == torch.float64  # the oracle stays right
        return (loss if exact else loss * 1.01,)

    monkeypatch.setitem(CASES, "attention_mse", replace(case, call=wrong))
    _, rows = measure(("attention_mse",), [TINY], "cpu")
    ours = [row for row in rows if row.form == "torch"]
    assert len(ours) == 2
    assert all(row.note is not None and "WRONG" in row.note and not row.seconds for row in ours)


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="Liger-Kernel is installed")
def test_a_peer_that_is_not_there_is_said() -> None:
    _, rows = measure(("kl_loss",), [TINY], "cpu")
    (peer,) = {row.note for row in rows if row.form.startswith("Liger")}
    assert peer == "not installed"


@pytest.mark.parametrize("op", CASES)
def test_every_op_is_proved_and_timed(op: str) -> None:
    _, rows = measure((op,), [TINY], "cpu")
    ours = [row for row in rows if row.form == "torch"]
    assert len(ours) == (1 if CASES[op].both is None else 2)
    assert all(row.seconds and row.note is None for row in ours)
    peers = [row for row in rows if row.form in CASES[op].peers]
    assert all(row.note in (None, "not installed") for row in peers)


@pytest.mark.interp
@pytest.mark.parametrize("op", CASES)
def test_triton_is_proved_too(op: str) -> None:
    assert interpreted()
    assert PROVING.time > 64  # more than a chunk
    _, rows = measure((op,), [TINY], "cpu")
    ours = [row for row in rows if row.form == "triton"]
    assert len(ours) == (1 if CASES[op].both is None else 2)
    assert all(row.seconds and row.note is None for row in ours)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--cpu", "--op", "gle", "-o", str(tmp_path)]) != 0
    message = capsys.readouterr().err.strip()
    assert message.startswith("bench: error: op 'gle' given; allowed: gla")
    assert "\n" not in message
