"""Bursts: a run goes from machine to machine in parts, and ends as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from safetensors.torch import load_file

from edgekit.config import dump, load
from edgekit.distill.burst.__main__ import main
from edgekit.distill.burst.collect import collect
from edgekit.distill.burst.pack import pack, write_burst
from edgekit.distill.burst.pieces import Entry, Plan, Result, cut, join, keep
from edgekit.distill.burst.software import HERE, requirements
from edgekit.distill.metrics import read_metrics
from edgekit.distill.recipe import Recipe
from edgekit.distill.run import Settings, distill
from edgekit.errors import TrainingError
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
    settings += ["transfer.needles.share=0.0", "tuning.needles.share=0.0", "lolcats.window=8"]
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
    parts = [parcel / name for name in pack(parcel, [*arguments, "-o", str(student)]).parts]
    there, out = tmp_path / "there", tmp_path / "out"
    burst(parcel, there, *parts, "--out", out, "--seconds", "1", "--grace", "600")
    results = {path.name: path.stat().st_size for path in out.iterdir()}
    killed = burst(parcel, there, "--out", out, "--seconds", "1", "--grace", "0")
    assert not killed
    assert results == {path.name: path.stat().st_size for path in out.iterdir()}
    assert main(["collect", str(out), "-o", str(student)]) == 0
    run = tmp_path / "student.run"
    assert losses(run) == losses(whole)[:1]

    here = tmp_path / "here"
    shutil.copytree(run, tmp_path / "here.run")
    distill(teacher_directory, here, smoke(**STEPS), data=[text], settings=settings, resume=True)
    assert losses(here) == losses(whole)

    parts = [parcel / name for name in pack(parcel, [*arguments, "-o", str(student)]).parts]
    elsewhere = tmp_path / "elsewhere"
    burst(parcel, elsewhere, *parts, "--out", out, "--seconds", "600")
    assert main(["collect", str(out), "-o", str(student)]) == 0
    assert not run.exists()
    assert losses(student) == losses(whole)
    assert sorted(p.name for p in student.iterdir()) == sorted(p.name for p in whole.iterdir())
    expected, found = (load_file(d / "student.safetensors") for d in (whole, student))
    for name, tensor in expected.items():
        assert_close(name, tensor, found[name], ratio=TOLERANCE["float16"])


@pytest.fixture(scope="module")
def packed(
    teacher_directory: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A packed folder, of a run that has begun, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("packed")
    run = folder / "student.run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    (run / "checkpoint-000000003.safetensors").write_bytes(b"three" * 10**6)
    given = [str(teacher_directory), "-o", str(folder / "student"), f"--data={text}"]
    pack(folder / "burst", given, part_mib=12)
    return folder / "burst", given


def far(folder: Path, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", folder / "burst.pyz", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_parts_are_received_one_by_one(packed: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, work = packed[0], tmp_path / "work"
    parts = sorted(folder.glob("part-*.zip"))
    assert len(parts) > 1
    assert all(part.stat().st_size <= 12 * 2**20 for part in parts)
    told = [far(folder, work, part).stdout.strip() for part in parts]
    for number, line in enumerate(told[:-1], 1):
        assert line == f"burst: still to come: {', '.join(p.name for p in parts[number:])}"
    assert told[-1] == "burst: all is here; give --out"


def test_nothing_is_trained_before_all_is_there(
    packed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    done = far(packed[0], tmp_path / "work", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("burst: error: not received yet: part-1.zip")
    assert done.stderr.count("\n") == 1


def test_next_pack_writes_only_what_changed(packed: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, given = packed
    before = {part: part.stat().st_mtime_ns for part in sorted(folder.glob("part-*.zip"))}
    (folder.parent / "student.run/checkpoint-000000004.safetensors").write_bytes(b"four" * 10**6)
    plan = pack(folder, given, part_mib=12)
    assert [Path(e.path).name for e in plan.run] == [
        "metrics.jsonl",
        "checkpoint-000000004.safetensors",
    ]
    changed = [part.name for part, at in before.items() if part.stat().st_mtime_ns != at]
    assert changed == [list(before)[-1].name]


@pytest.mark.parametrize("damage", ["cut off", "altered"])
def test_damaged_part_is_refused(
    packed: tuple[Path, list[str]], tmp_path: Path, damage: str
) -> None:
    data = bytearray((packed[0] / "part-1.zip").read_bytes())
    data[10**6] ^= 1
    part = tmp_path / "part-1.zip"
    part.write_bytes(data[: 2 * 10**6] if damage == "cut off" else data)
    done = far(packed[0], tmp_path / "work", part)
    assert done.returncode == 1
    assert f"{part}: cannot be read" in done.stderr
    assert "copy it again" in done.stderr


def test_another_python_is_refused(tmp_path: Path) -> None:
    plan = Plan(name="s", python="3.0", arguments=(), files=(), run=(), parts={})
    write_burst(tmp_path / "burst.pyz", plan)
    assert "packed for Python 3.0, here is 3." in far(tmp_path, tmp_path / "work").stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["SOURCE"], "give the arguments of"),
        (["-o", "s"], "give the arguments of"),
        (["SOURCE", "-o"], "give the arguments of"),
        (["SOURCE", "-o", "s", "--resume"], "--resume given"),
        (["SOURCE", "-o", "s", "--stop-after=9"], "--stop-after given"),
        (["owner/model", "-o", "s"], "allowed first: a model directory"),
        (["SOURCE", "-o", "s", "--data", "gone.txt"], "gone.txt: no such file here"),
        (["SOURCE", "-o", "s", "--data", "datasets:x"], "a burst has no network"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_pack_refuses_what_cannot_run_there(
    teacher_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    told: str,
) -> None:
    arguments = [str(teacher_directory) if a == "SOURCE" else a for a in given]
    assert main(["pack", str(tmp_path / "burst"), "--", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "burst").exists()


def test_packages_are_those_of_here_without_torch() -> None:
    found = requirements("3.12")
    assert found["transformers"] == metadata.version("transformers")
    assert not {"torch", "numpy", "triton", "matplotlib"} & set(found)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """What a burst of the student `s` left at step 3."""
    out = tmp_path / "out"
    out.mkdir()
    file = tmp_path / "checkpoint-000000003.safetensors"
    file.write_bytes(b"0123456789" * 100)
    pieces = []
    for name, data in cut(file, 300):
        keep(name, data, out)
        pieces.append(name)
    result = Result(name="s", finished=False, files=(Entry(path=file.name, pieces=tuple(pieces)),))
    (out / "burst.json").write_text(json.dumps(dump(result)), encoding="utf-8")
    return out


def test_pieces_make_the_file_again(results: Path, tmp_path: Path) -> None:
    entry = load(Result, json.loads((results / "burst.json").read_text()), where="").files[0]
    assert len(entry.pieces) == 4
    assert join(entry, results, tmp_path / "new").read_bytes() == b"0123456789" * 100
    (results / entry.pieces[2]).write_bytes(b"?")
    with pytest.raises(TrainingError, match=r"damaged, and removed; copy it again"):
        join(entry, results, tmp_path / "new")
    with pytest.raises(TrainingError, match=r"missing .*; copy it again"):
        join(entry, results, tmp_path / "new")


@pytest.mark.parametrize("path", ["../out", "/out", "a/../../out"])
def test_pieces_never_leave_their_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(TrainingError, match="leads outside"):
        join(Entry(path=path, pieces=()), tmp_path, tmp_path / "new")


def test_collect_never_goes_back(results: Path, tmp_path: Path) -> None:
    run = tmp_path / "s.run"
    run.mkdir()
    (run / "checkpoint-000000004.safetensors").write_bytes(b"4")
    with pytest.raises(TrainingError, match="is further than"):
        collect(results, tmp_path / "s")
    assert [path.name for path in run.iterdir()] == ["checkpoint-000000004.safetensors"]


def test_collect_refuses_results_of_another_student(results: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="of the student s, not t"):
        collect(results, tmp_path / "t")


def test_collect_refuses_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"burst.json: cannot be read"):
        collect(tmp_path, tmp_path / "s")
