"""Runs that were killed, stopped, or begun otherwise."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgekit.adapters.tune.manifest import read_tune
from edgekit.adapters.tune.recipe import Recipe
from edgekit.adapters.tune.recorder import FILE, WHOLE, read_records
from edgekit.adapters.tune.run import Settings, tune
from edgekit.cli.main import main
from edgekit.errors import TrainingError

Small = Callable[..., Recipe]
SETTINGS = Settings(cpu=True, precision="fp32")
STOPPED = Settings(cpu=True, precision="fp32", stop_after=0.0)
TOLD = ("step", "loss", "lr", "gradient_norm", "trainable", "gradient_bytes", "optimizer_bytes")


def told(folder: Path) -> list[tuple[float, ...]]:
    """What a run says of its steps, times left out."""
    return [tuple(r[key] for key in (*TOLD, "score_bytes")) for r in read_records(folder / FILE)]


def assert_same(one: Path, other: Path) -> None:
    assert told(one) == told(other)
    tensors = [load_file(out / "adapter_model.safetensors") for out in (one, other)]
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    freezes = [
        [(e["step"], e["module"], e["part"]) for e in read_tune(o).freezes] for o in (one, other)
    ]
    assert freezes[0] == freezes[1]


@pytest.fixture(scope="module")
def whole(
    checkpoint: Path, examples: Path, small: Small, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("whole") / "adapter"
    plan = small("aflora", dropout=0.1)
    assert tune(checkpoint, out, plan, data=[examples], settings=SETTINGS).finished
    return out


def test_killed_run_goes_on_exactly(
    whole: Path, checkpoint: Path, examples: Path, small: Small, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    recipe = tmp_path / "aflora.toml"
    recipe.write_text(_toml(small("aflora", dropout=0.1)))
    command = ["tune", str(checkpoint), "-o", str(out), "--data", str(examples), "--cpu"]
    command += ["--recipe", str(recipe), "--precision", "fp32", "--checkpoint-seconds", "1"]
    slow = "import time, torch; step = torch.optim.AdamW.step; torch.optim.AdamW.step = "
    slow += "lambda *a, **k: (time.sleep(0.4), step(*a, **k))[1]"
    code = f"{slow}; import sys; from edgekit.cli.main import main; sys.exit(main({command!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as here: more threads add up in other orders
    )
    folder = tmp_path / "adapter.run"
    _await(lambda: len(read_records(folder / FILE)) >= 6, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert list(folder.glob(f"checkpoint-*/{WHOLE}"))
    with pytest.raises(TrainingError, match="holds an unfinished run; --resume goes on"):
        tune(checkpoint, out, small("aflora"), data=[examples])
    assert main([*command, "--resume"]) == 0
    assert_same(whole, out)


def _toml(plan: Recipe) -> str:
    freeze = plan.freeze
    assert freeze is not None
    top = {
        key: getattr(plan, key)
        for key in (
            "description",
            "method",
            "rank",
            "dropout",
            "steps",
            "batch",
            "micro_batch",
            "lr",
        )
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    lines += [f"weight_decay = {plan.weight_decay}", "[freeze]", f"interval = {freeze.interval}"]
    return "\n".join(lines) + "\n"


def _await(done: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    for _ in range(1200):
        if done():
            return
        if process.poll() is not None:
            pytest.fail("the run ended before it could be killed")
        time.sleep(0.05)
    pytest.fail("the run did not come so far in a minute")


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_stopped_run_goes_on_exactly(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path, method: str
) -> None:
    plan = small(method, steps=5, dropout=0.1)
    tune(checkpoint, tmp_path / "whole", plan, data=[examples], settings=SETTINGS)
    for done in (1, 2):  # each stops after one step
        report = tune(
            checkpoint, tmp_path / "a", plan, data=[examples], settings=STOPPED, resume=True
        )
        assert (report.finished, report.manifest) == (False, None)
        assert len(read_records(tmp_path / "a.run" / FILE)) == done
    report = tune(checkpoint, tmp_path / "a", plan, data=[examples], settings=SETTINGS, resume=True)
    assert report.finished
    assert_same(tmp_path / "whole", tmp_path / "a")


def test_half_a_checkpoint_is_passed_over(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path
) -> None:
    plan = small("aflora", steps=5)
    tune(checkpoint, tmp_path / "whole", plan, data=[examples], settings=SETTINGS)
    out, folder = tmp_path / "a", tmp_path / "a.run"
    tune(checkpoint, out, plan, data=[examples], settings=STOPPED)
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-3")
    (folder / "checkpoint-3" / WHOLE).unlink()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    with (folder / FILE).open("a") as file:
        file.write('{"step": 1, "lo')
    tune(checkpoint, out, plan, data=[examples], settings=SETTINGS, resume=True)
    assert_same(tmp_path / "whole", out)


def test_other_settings_are_named(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    tune(checkpoint, out, small("aflora"), data=[examples], settings=STOPPED)
    changed = small("aflora", lr=3e-2, freeze__interval=3)
    with pytest.raises(TrainingError) as caught:
        tune(checkpoint, out, changed, data=[examples], settings=SETTINGS, resume=True)
    assert "recipe.lr was 0.02, is 0.03" in str(caught.value)
    assert "recipe.freeze.interval was 2, is 3" in str(caught.value)
    assert tune(checkpoint, out, changed, data=[examples], settings=SETTINGS, force=True).finished


def test_one_owner(checkpoint: Path, examples: Path, small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "a.run"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="another process is running it"):
            tune(checkpoint, tmp_path / "a", small("lora"), data=[examples])
