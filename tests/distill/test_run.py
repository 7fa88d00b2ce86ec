"""A whole distillation: kill and resume, many processes, changed settings, loss that explodes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgekit.cli.main import main
from edgekit.distill.checkpoint import PREFIX
from edgekit.distill.metrics import read_metrics
from edgekit.distill.recipe import Recipe
from edgekit.distill.run import DistillReport, Settings, distill
from edgekit.errors import BundleError, SourceError, TrainingError, UsageError
from edgekit.models.decoder import Decoder
from edgekit.sources import open_source
from edgekit.sources.student import apply_student, open_model, read_student
from edgekit.testing import TOLERANCE, assert_close

SETTINGS = Settings(cpu=True, precision="fp32", checkpoint_seconds=0.0, dtype="float32")
Smoke = Callable[..., Recipe]


@pytest.fixture(scope="module")
def whole(
    teacher_directory: Path, text: Path, smoke: Smoke, tmp_path_factory: pytest.TempPathFactory
) -> DistillReport:
    """The student of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "student"
    settings = Settings(cpu=True, precision="fp32", dtype="float32", held_out=text)
    return distill(teacher_directory, out, smoke(), data=[text], settings=settings)


def losses(folder: Path) -> list[tuple[int, int, float]]:
    return [(r["stage"], r["step"], r["loss"]) for r in read_metrics(folder)]


def test_student_records_where_it_came_from(whole: DistillReport, text: Path) -> None:
    student = read_student(whole.out)
    manifest = student.manifest
    assert [(r.stage, r.steps, r.tokens) for r in manifest.training] == [(1, 4, 512), (2, 4, 512)]
    assert manifest.recipe["name"] == "smoke"
    assert manifest.data[0]["name"] == text.name
    assert manifest.metrics["perplexity"] == whole.metrics["perplexity"] > 1
    assert sorted(p.name for p in whole.out.iterdir()) == [
        "loss.png",
        "metrics.jsonl",
        "student.json",
        "student.safetensors",
    ]
    assert not list(whole.out.parent.glob("*.run"))


def test_student_opens_over_its_teacher(whole: DistillReport, teacher_directory: Path) -> None:
    source, config, store = open_model(whole.out, base=teacher_directory)
    assert set(config.mixers) == {"lawcat"}
    logits, _ = Decoder.from_store(config, store)(torch.arange(3, 40)[None])
    assert logits.isfinite().all()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(store.tensor(name), source.weights.tensor(name))


def test_same_seed_same_student(
    whole: DistillReport, teacher_directory: Path, text: Path, smoke: Smoke, tmp_path: Path
) -> None:
    again = distill(teacher_directory, tmp_path / "s", smoke(), data=[text], settings=SETTINGS)
    assert losses(again.out) == losses(whole.out)


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_run_goes_on_exactly(
    whole: DistillReport,
    teacher_directory: Path,
    text: Path,
    small: list[str],
    tmp_path: Path,
    stage: int,
) -> None:
    out = tmp_path / "student"
    command = ["distill", str(teacher_directory), "-o", str(out), "--data", str(text)]
    command += ["--cpu", "--precision", "fp32", *small]
    command += ["--checkpoint-seconds", "1"]
    slow = "import time, torch; step = torch.optim.AdamW.step; torch.optim.AdamW.step = "
    slow += "lambda *a, **k: (time.sleep(0.6), step(*a, **k))[1]"
    code = f"{slow}; import sys; from edgekit.cli.main import main; sys.exit(main({command!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as here: more threads add up in other orders
    )
    folder = tmp_path / "student.run"
    _await(lambda: any(s == stage and n >= 2 for s, n, _ in losses(folder)), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert list(folder.glob(f"{PREFIX}*"))
    assert main([*command, "--resume"]) == 0
    assert losses(out) == losses(whole.out)
    resumed, undisturbed = (load_file(p / "student.safetensors") for p in (out, whole.out))
    for name, tensor in undisturbed.items():
        assert_close(name, tensor.half(), resumed[name], ratio=TOLERANCE["float16"])


def _await(done: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if done():
            return
        if process.poll() is not None:
            pytest.fail("the run ended before it could be killed")
        time.sleep(0.05)
    pytest.fail("the run did not come so far in a minute")


def test_stopped_run_goes_on_exactly(
    whole: DistillReport, teacher_directory: Path, text: Path, smoke: Smoke, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    hurried = Settings(cpu=True, precision="fp32", stop_after=0.0, dtype="float32")
    runs, finished = 0, False
    while not finished and runs < 10:
        finished = distill(
            teacher_directory, out, smoke(), data=[text], settings=hurried, resume=True
        ).finished
        runs += 1
    assert runs == 7  # one step each, and where stage 1 ends, stage 2 begins
    assert losses(out) == losses(whole.out)


@pytest.mark.parametrize("steps", [1, 5], ids=["stage 1", "stage 2"])
def test_student_so_far(
    teacher_directory: Path, text: Path, smoke: Smoke, tmp_path: Path, steps: int
) -> None:
    out = tmp_path / "student"
    hurried = Settings(cpu=True, precision="fp32", stop_after=0.0)
    for _ in range(steps):
        distill(teacher_directory, out, smoke(), data=[text], settings=hurried, resume=True)
    finish = Settings(cpu=True, precision="fp32", finish=True)
    report = distill(teacher_directory, out, smoke(), data=[text], settings=finish, resume=True)
    assert report.finished
    assert [(r.stage, r.steps) for r in report.training] == ([(1, 1)], [(1, 4), (2, 2)])[steps > 1]
    source, config, store = open_model(out, base=teacher_directory)
    assert config.num_layers == source.config.num_layers
    assert not (tmp_path / "student.run").exists()
    assert store.tensor("model.layers.0.self_attn.conv_q.weight").isfinite().all()


def test_nothing_to_finish(
    teacher_directory: Path, text: Path, smoke: Smoke, tmp_path: Path
) -> None:
    finish = Settings(cpu=True, precision="fp32", finish=True)
    with pytest.raises(UsageError, match="no run to finish"):
        distill(
            teacher_directory,
            tmp_path / "s",
            smoke(),
            data=[text],
            settings=finish,
            resume=True,
        )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"transfer__lr": 0.5}, r"recipe.transfer.lr was 0.01, is 0.5"),
        ({"lawcat__conv_size": 3}, r"recipe.lawcat.conv_size was 4, is 3"),
    ],
    ids=["rate", "mixer"],
)
def test_resume_refuses_what_changed(
    teacher_directory: Path,
    text: Path,
    smoke: Smoke,
    tmp_path: Path,
    change: dict[str, Any],
    told: str,
) -> None:
    out = tmp_path / "student"
    hurried = Settings(cpu=True, precision="fp32", stop_after=0.0)
    distill(teacher_directory, out, smoke(), data=[text], settings=hurried)
    with pytest.raises(TrainingError, match="unfinished run; --resume"):
        distill(teacher_directory, out, smoke(), data=[text], settings=hurried)
    with pytest.raises(TrainingError, match=told):
        distill(teacher_directory, out, smoke(**change), data=[text], settings=hurried, resume=True)
    begun = distill(
        teacher_directory, out, smoke(**change), data=[text], settings=hurried, force=True
    )
    assert not begun.finished


def test_resume_refuses_other_data(
    teacher_directory: Path, text: Path, smoke: Smoke, tmp_path: Path
) -> None:
    out, other = tmp_path / "student", tmp_path / text.name
    hurried = Settings(cpu=True, precision="fp32", stop_after=0.0)
    distill(teacher_directory, out, smoke(), data=[text], settings=hurried)
    other.write_text(text.read_text(encoding="utf-8") + "More.", encoding="utf-8")
    with pytest.raises(TrainingError, match=r"data\.text\.txt was"):
        distill(teacher_directory, out, smoke(), data=[other], settings=hurried, resume=True)


@pytest.mark.parametrize("stage", ["transfer", "tuning"])
def test_loss_that_explodes_stops_and_names_the_layer(
    teacher_directory: Path, text: Path, smoke: Smoke, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "student"
    plan = smoke(**{f"{stage}__lr": 1e30, f"{stage}__clip": 1e30, f"{stage}__warmup": 0.0})
    with pytest.raises(TrainingError, match=rf"stage {stage}, step \d: .* first in .*layer"):
        distill(teacher_directory, out, plan, data=[text], settings=SETTINGS)
    assert not out.exists()
    kept = sorted((tmp_path / "student.run").glob(f"{PREFIX}*"))
    tensors = load_file(kept[-1])
    assert all(t.isfinite().all() for n, t in tensors.items() if n.startswith("parameter."))


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["whole", "sharded"])
def test_two_processes_learn_what_one_learns(
    whole: DistillReport,
    teacher_directory: Path,
    text: Path,
    small: list[str],
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    out = tmp_path / "student"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "edgekit", "distill", str(teacher_directory), "-o", str(out), "--data"]
    command += [str(text), "--precision", "fp32", "--held-out", str(text), *small, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for (_, _, one), (_, _, two) in zip(losses(whole.out), losses(out), strict=True):
        assert two == pytest.approx(one, rel=2e-5)


def test_begins_from_an_earlier_student(
    whole: DistillReport, teacher_directory: Path, text: Path, smoke: Smoke, tmp_path: Path
) -> None:
    plan = smoke(transfer__tokens=0, tuning__lr=0.0, tuning__mixer_lr=0.0)
    report = distill(
        teacher_directory,
        tmp_path / "s",
        plan,
        data=[text],
        init=whole.out,
        settings=Settings(cpu=True, precision="fp32", dtype="float32", held_out=text),
    )
    assert report.metrics["perplexity"] == pytest.approx(whole.metrics["perplexity"], rel=1e-5)
    assert [(r.stage, r.steps) for r in report.training] == [(1, 4), (2, 4), (2, 4)]
    before, after = (read_student(d).manifest for d in (whole.out, report.out))
    (run,) = after.lineage
    assert (run["name"], run["recipe"]) == (before.name, before.recipe)
    assert run["sha256"] == before.files["student.safetensors"].sha256
    curve = read_metrics(report.out)
    assert [(r["stage"], r["step"]) for r in curve[4:]] == [(2, i) for i in range(8)]
    assert curve[-1]["tokens"] == 1024


def test_gates_of_an_earlier_student_may_become_slower(
    whole: DistillReport, teacher_directory: Path, text: Path, smoke: Smoke, tmp_path: Path
) -> None:
    plan = smoke(
        transfer__tokens=0, tuning__lr=0.0, tuning__mixer_lr=0.0, lawcat__gate_divisor=32.0
    )
    out = tmp_path / "s"
    distill(teacher_directory, out, plan, data=[text], init=whole.out, settings=SETTINGS)
    before, after = read_student(whole.out), read_student(out)
    assert before.manifest.lawcat.gate_divisor == 16
    assert after.manifest.lawcat == replace(before.manifest.lawcat, gate_divisor=32.0)
    gates = [name for name in before.tensors if "gate" in name]
    assert gates
    for name in gates:
        assert torch.equal(before.tensors.tensor(name), after.tensors.tensor(name))


def test_refuses_an_earlier_student_that_does_not_fit(
    whole: DistillReport, tiny_checkpoint: Any, text: Path, smoke: Smoke, tmp_path: Path
) -> None:
    other = tiny_checkpoint("llama", seed=9)
    with pytest.raises((UsageError, SourceError), match="made from"):
        distill(other, tmp_path / "s", smoke(), data=[text], init=whole.out, settings=SETTINGS)
    base, plan = tiny_checkpoint("llama"), smoke(softmax_layers=[1])
    with pytest.raises(UsageError, match="mixers or their options differ"):
        distill(base, tmp_path / "s", plan, data=[text], init=whole.out, settings=SETTINGS)


def test_student_of_another_base_is_refused(whole: DistillReport, tiny_checkpoint: Any) -> None:
    other = open_source(tiny_checkpoint("llama", seed=9))
    with pytest.raises(SourceError, match="was made from"):
        apply_student(other, read_student(whole.out))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"transfer__tokens": 0, "tuning__tokens": 0}, "nothing to do"),
        ({"softmax_layers": [0, 1, 2]}, "nothing to distil"),
        ({"softmax_layers": [3]}, "softmax layer 3 given; allowed: 0 to 2"),
        ({"transfer__needles__share": 0.5, "transfer__needles__kinds": ["niah-2"]}, "essay"),
    ],
    ids=["no steps", "no layer", "layer", "haystack"],
)
def test_bad_settings(
    teacher_directory: Path,
    text: Path,
    smoke: Smoke,
    tmp_path: Path,
    overrides: dict[str, Any],
    told: str,
) -> None:
    out = tmp_path / "s"
    with pytest.raises(UsageError, match=told):
        distill(teacher_directory, out, smoke(**overrides), data=[text], settings=SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_existing_student_is_refused_before_training(
    whole: DistillReport, teacher_directory: Path, text: Path, smoke: Smoke
) -> None:
    before = json.loads((whole.out / "student.json").read_text())
    with pytest.raises(BundleError, match="exists"):
        distill(teacher_directory, whole.out, smoke(), data=[text], settings=SETTINGS)
    assert json.loads((whole.out / "student.json").read_text()) == before
    assert not list(whole.out.parent.glob("*.run"))


def test_one_run_at_a_time(
    teacher_directory: Path, text: Path, smoke: Smoke, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    hurried = Settings(cpu=True, precision="fp32", stop_after=0.0)
    distill(teacher_directory, out, smoke(), data=[text], settings=hurried)
    with (tmp_path / "student.run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="another process"):
            distill(teacher_directory, out, smoke(), data=[text], settings=hurried, resume=True)
