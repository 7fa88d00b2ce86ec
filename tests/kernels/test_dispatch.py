"""Which form of an op runs, and who may say so."""

import logging

import pytest
import torch

from edgekit.errors import UnsupportedError, UsageError
from edgekit.kernels import dispatch
from edgekit.kernels.dispatch import VARIABLE, choose, forced
from edgekit.kernels.gla import gla
from edgekit.kernels.gla.reference import recurrent_gla
from edgekit.testing import TOLERANCE, assert_close

X = torch.zeros(1)


def test_a_cpu_takes_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose("op", X) == "torch"


def test_the_environment_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose("op", X) == "reference"
    with forced("torch"):  # code is nearer than the environment
        assert choose("op", X) == "torch"
    assert choose("op", X) == "reference"


def test_an_unknown_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(UsageError, match=r"EDGEKIT_KERNELS=cuda given; allowed: auto, reference"):
        choose("op", X)


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with forced("triton"), pytest.raises(UnsupportedError, match=r"op: .* forced on cpu"):
        choose("op", X)


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger="edgekit.kernels"), forced("torch"):
        choose("op", X)
        choose("op", X)
    assert [record.message for record in caplog.records] == ["op: torch on cpu"]


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("packed", [None, (0, 5, 5, 40)], ids=["batch", "packed"])
@pytest.mark.parametrize("gates", [1, 6])
def test_gla_is_the_recurrence(
    form: dispatch.Form, packed: tuple[int, ...] | None, gates: int
) -> None:
    q, k = torch.rand(2, 1, 40, 2, 6, dtype=torch.float64)
    v = torch.randn(1, 40, 2, 5, dtype=torch.float64)
    g = -torch.rand(1, 40, 2, gates, dtype=torch.float64)
    cu_seqlens = None if packed is None else torch.tensor(packed)
    wanted = recurrent_gla(q, k, v, g, cu_seqlens=cu_seqlens)
    with forced(form):
        found = gla(q, k, v, g, cu_seqlens=cu_seqlens)
    for name, expected, actual in zip(("output", "state"), wanted, found, strict=True):
        assert_close(name, expected, actual, ratio=TOLERANCE["float64"])
