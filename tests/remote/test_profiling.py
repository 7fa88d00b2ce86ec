"""`edgekit profile` on a device: there and back again."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import BundleError, EngineError
from edgekit.remote import profile_remotely

HOST = "127.0.0.1"
BRIEF = ("--prompt", "8", "--depth", "0,40", "--gen", "2", "--repeat", "1", "--threads", "1")


@pytest.mark.slow
def test_there_and_back_again(server: Any, bundle: Path) -> None:
    """Twice; a busy machine is told of by the device as by any other, which is no failure."""
    steps: list[tuple[str, int, int]] = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            report = profile_remotely(
                HOST, bundle, BRIEF, python=sys.executable, ssh=server.ssh,
                progress=lambda *step: steps.append(step),
            )  # fmt: skip
        assert all("machine was busy" in str(warning.message) for warning in told)
        (found,) = json.loads(report)
        assert found["complete"]
        assert found["bundle"] == bundle.name
        assert [row["depth"] for row in found["decode"]] == [0, 40]
    names = [name for name, _, _ in steps]
    assert names.count(f"measure on {HOST}") == 2
    assert "read 8 tokens" in names
    assert len([name for name in names if name == f"copy {bundle.name} to {HOST}"]) > 2
    second = names[names.index(f"connect to {HOST}", 1) :]
    assert f"copy {bundle.name} to {HOST}" not in second


def test_what_fails_there_is_told_in_a_line(server: Any, tiny_bundle: Path) -> None:
    with pytest.raises(EngineError) as found:
        profile_remotely(
            HOST, tiny_bundle, ["--prompt", "x y"], python=sys.executable, ssh=server.ssh
        )
    assert str(found.value).startswith(f"{HOST}: edgekit profile failed there: argument --prompt: ")
    assert "'x y' given" in str(found.value)


def test_what_is_no_bundle_is_refused_before_connecting(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not an edgekit bundle"):
        profile_remotely("nowhere.invalid", tmp_path)
