"""What the engines say of their operators, of loading, and what the system says of energy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.runtime import load
from edgekit.runtime.energy import energy_meter
from edgekit.runtime.operators import measure_operators
from edgekit.runtime.starting import measure_starting
from edgekit.runtime.workload import Options

Bundles = Callable[[str], Path]
MULTIPLIES = {"openvino": "FullyConnected", "onnx": "MatMul"}


def test_operators_of_prompts_and_steps(bundle: Bundles, kind: str, engine: str) -> None:
    options = Options(prompts=(40,), depths=(0, 70), engine=engine, threads=1)
    prompt, first, deep = measure_operators(bundle(kind), options)
    assert [x.test for x in (prompt, first, deep)] == ["pp40", "tg @ 0", "tg @ 70"]
    assert (prompt.calls, first.calls, deep.calls) == (2, 16, 16)
    for found in (prompt, first, deep):
        times = [operator.ms for operator in found.operators]
        assert times == sorted(times, reverse=True)
        assert found.ms == pytest.approx(sum(times))
        products = [o for o in found.operators if o.type.startswith(MULTIPLIES[engine])]
        assert sum(o.count for o in products) >= 4  # of two layers


def test_a_model_loaded_without_profiling_says_so(bundle: Bundles, engine: str) -> None:
    model = load(bundle("kv_head"), engine=engine)
    model.session().append(np.array([1, 2]))
    assert model.calls == 0
    with pytest.raises(UsageError, match="profiling=True"):
        model.operator_times()


def test_blobs_are_kept_for_the_second_load(bundle: Bundles) -> None:
    found = measure_starting(bundle("kv_head"), Options(engine="openvino", threads=1))
    assert found is not None
    assert 0 < found.cold_compile < found.cold_load
    assert 0 < found.cached_compile < found.cached_load
    assert measure_starting(bundle("kv_head"), Options(engine="onnx")) is None


def package(root: Path, name: str, microjoules: int) -> Path:
    zone = root / name
    zone.mkdir(exist_ok=True)
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text("999999\n")
    return zone


def test_energy_is_summed_over_packages_and_over_the_end_of_a_counter(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 900_000)
    package(tmp_path, "intel-rapl:1", 0)
    package(tmp_path, "intel-rapl:0:0", 0)  # the cores: a part of package 0
    joules = energy_meter(tmp_path)
    package(tmp_path, "intel-rapl:0", 100_000)
    package(tmp_path, "intel-rapl:0:0", 500_000)
    assert joules() == pytest.approx(0.2)
    package(tmp_path, "intel-rapl:1", 300_000)
    assert joules() == pytest.approx(0.5)


def test_no_energy_where_nobody_may_read_it(tmp_path: Path) -> None:
    assert energy_meter(tmp_path)() is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert energy_meter(tmp_path)() is None
