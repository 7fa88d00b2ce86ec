"""Bursts: a run goes from machine to machine in parts, and ends as if nothing had happened."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from safetensors.torch import load_file

from edgekit.distill.burst.__main__ import main
from edgekit.distill.burst.pack import pack
from edgekit.distill.burst.software import HERE, requirements
from edgekit.distill.metrics import read_metrics
from edgekit.distill.recipe import Recipe
from edgekit.distill.run import Settings, distill
from edgekit.testing import TOLERANCE, assert_close

STEPS = {"transfer__tokens": 256, "tuning__tokens": 256}  # two of each stage


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees torch, numpy, what they need, and nothing else of this one's."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3.*/site-packages")
    for name in requirements(HERE, roots=("torch", "numpy"), left_out=()):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(str(distribution.locate_file(top)))
    return folder / "bin" / "python"


@pytest.fixture
def burst(bare_python: Path) -> Callable[..., str]:
    """Runs `burst.pyz` as a far machine would, and returns what it said."""

    def run(folder: Path, *arguments: Path | str, fails: str = "") -> str:
        command = [bare_python, folder / "burst.pyz", *arguments]
        environment = {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (1 if fails else 0), done.stderr
        assert fails in done.stderr
        return done.stdout

    return run


@pytest.fixture
def arguments(teacher_directory: Path, text: Path) -> list[str]:
    """Of `edgekit distill`, but for the student."""
    settings = [f"{key.replace('__', '.')}={value}" for key, value in STEPS.items()]
    settings += ["transfer.needles.share=0.0", "tuning.needles.share=0.0"]
    given = [str(teacher_directory), "--data", str(text), "--recipe=smoke", "--cpu"]
    return [*given, "--precision", "fp32", *(part for s in settings for part in ("--set", s))]


def losses(folder: Path) -> list[tuple[int, int, float]]:
    return [(r["stage"], r["step"], r["loss"]) for r in read_metrics(folder)]


@pytest.mark.slow
def test_bursts_end_in_the_student_of_a_run_that_nothing_disturbs(
    teacher_directory: Path,
    text: Path,
    smoke: Callable[..., Recipe],
    burst: Callable[..., str],
    arguments: list[str],
    tmp_path: Path,
) -> None:
    whole, student, parcel = tmp_path / "whole", tmp_path / "student", tmp_path / "parcel"
    settings = Settings(cpu=True, precision="fp32")
    distill(teacher_directory, whole, smoke(**STEPS), data=[text], settings=settings)
    first = pack(parcel, [*arguments, "-o", str(student)], part_mib=12)
    parts = [parcel / name for name in first.parts]
    assert len(parts) > 1
    assert all(part.stat().st_size <= 12 * 2**20 for part in parts)
    there, out = tmp_path / "there", tmp_path / "out"
    assert "part-2.zip" in burst(parcel, there, parts[0])
    burst(parcel, there, "--out", out, fails="not received yet: part-2.zip")
    burst(parcel, there, *parts[1:])
    burst(parcel, there, "--out", out, "--seconds", "1", "--grace", "600")
    assert main(["collect", str(out), "-o", str(student)]) == 0
    run = tmp_path / "student.run"
    assert losses(run) == losses(whole)[:1]

    written = {part: part.stat().st_mtime_ns for part in parts}
    second = pack(parcel, [*arguments, "-o", str(student)], part_mib=12)
    assert second.run
    assert sum(part.stat().st_mtime_ns != at for part, at in written.items()) <= 1
    elsewhere = tmp_path / "elsewhere"
    parts = [parcel / name for name in second.parts]
    burst(parcel, elsewhere, *parts, "--out", out, "--seconds", "600")
    assert main(["collect", str(out), "-o", str(student)]) == 0
    assert not run.exists()
    assert losses(student) == losses(whole)
    assert sorted(p.name for p in student.iterdir()) == sorted(p.name for p in whole.iterdir())
    expected, found = (load_file(d / "student.safetensors") for d in (whole, student))
    for name, tensor in expected.items():
        assert_close(name, tensor, found[name], ratio=TOLERANCE["float16"])
