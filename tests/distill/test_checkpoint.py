"""Checkpoints and records of a run survive what a kill or a disk does to them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgekit.distill import checkpoint
from edgekit.distill.checkpoint import Checkpoint, differing_keys
from edgekit.distill.metrics import FILE, MetricsLog, read_metrics
from edgekit.errors import TrainingError

POINT = Checkpoint(
    stage=1,
    step=3,
    tokens=24,
    seconds=1.5,
    loss=0.5,
    fingerprint={"recipe": {"seed": 1}},
    history=[{"stage": 1}],
    tensors={"parameter.a": torch.arange(4.0), "step.a": torch.tensor(3.0)},
)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 3, POINT)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert replace(found, tensors={}) == replace(POINT, tensors={})
    assert all(torch.equal(t, found.tensors[n]) for n, t in POINT.tensors.items())


def test_newest_that_can_be_read(tmp_path: Path) -> None:
    for number in (9, 10, 100):
        path = checkpoint.write(tmp_path, number, replace(POINT, step=number))
    assert len(list(tmp_path.iterdir())) == checkpoint.KEPT
    path.write_bytes(path.read_bytes()[:-3])
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 10


def test_none_and_all_damaged(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    checkpoint.write(tmp_path, 1, POINT).write_bytes(b"")
    with pytest.raises(TrainingError, match="no checkpoint can be read"):
        checkpoint.latest(tmp_path)
    checkpoint.forget(tmp_path)
    assert checkpoint.latest(tmp_path) is None


def test_differing_keys_are_dotted() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    new = {"a": {"b": 1, "c": 5}, "e": 4}
    assert differing_keys(old, new) == {"a.c": (2, 5), "d": (3, None), "e": (None, 4)}


def test_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, {}) as log:
        for step in range(4):
            log.write({"stage": 1, "step": step})
        log.write({"stage": 2, "step": 0})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"stage": 2, "st')
    assert len(read_metrics(tmp_path)) == 5
    with MetricsLog(tmp_path, {1: 3}) as log:
        log.write({"stage": 1, "step": 3, "again": True})
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert read_metrics(tmp_path)[-1]["again"]
