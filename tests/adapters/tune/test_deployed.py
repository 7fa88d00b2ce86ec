"""Bundles answer what PyTorch answers: merged, and with the adapter in their slots."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.adapters.tune.deployed import main
from edgekit.adapters.tune.recipe import Recipe
from edgekit.adapters.tune.run import Settings, tune
from edgekit.data.tuning_tasks import LABELS
from edgekit.export.pipeline import convert

ENGINES = ("openvino", "onnx")


@pytest.fixture(scope="module")
def made(
    checkpoint: Path,
    examples: Path,
    small: Callable[..., Recipe],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a tuned adapter, bundles with and without it, and a test set."""
    folder = tmp_path_factory.mktemp("deployed")
    settings = Settings(cpu=True, precision="fp32")
    tune(checkpoint, folder / "adapter", small("aflora"), data=[examples], settings=settings)
    options = {"weights": "fp32", "verify": False, "target": "generic-x86"}
    convert(checkpoint, folder / "merged", adapters=[folder / "adapter"], **options)
    convert(checkpoint, folder / "slots", adapter_slots=str(folder / "adapter"), **options)
    prompts = [f"Sentence {i} is {'very ' * (i % 4)}long. It is" for i in range(12)]
    lines = [
        {"id": str(i), "prompt": p, "completion": LABELS[i % 2]} for i, p in enumerate(prompts)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("task", ["sentiment", "restore"])
def test_every_place_gives_the_same_answers(
    task: str, made: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(checkpoint), str(made / "adapter"), "--task", task, "-o", str(tmp_path / "out")]
    command += ["--test", str(made / "test.jsonl"), "--samples", "10"]
    command += ["--bundle", f"merged={made / 'merged'}"]
    command += ["--bundle", f"slots={made / 'slots'}+{made / 'adapter'}"]
    assert main(command) == 0
    places = json.loads((tmp_path / "out" / "deployed.json").read_text())["places"]
    names = [place["name"] for place in places]
    assert names[0] == "PyTorch, fp32"
    assert set(names[1:]) == {f"{b}, {e}" for b in ("merged", "slots") for e in ENGINES}
    assert [(place["same"], place["samples"]) for place in places] == [(10, 10)] * 5
    assert "| merged, onnx |" in capsys.readouterr().out


def test_without_its_adapter_a_bundle_differs(made: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = [str(checkpoint), str(made / "adapter"), "--task", "restore", "--engine", "onnx"]
    command += ["--test", str(made / "test.jsonl"), "-o", str(tmp_path / "out")]
    assert main([*command, "--bundle", f"base={made / 'slots'}"]) == 0
    places = json.loads((tmp_path / "out" / "deployed.json").read_text())["places"]
    assert places[1]["same"] < places[1]["samples"]


def test_bundles_that_are_refused(
    made: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(checkpoint), str(made / "adapter"), "--task", "restore", "-o", str(tmp_path)]
    command += ["--test", str(made / "test.jsonl")]
    for bundles, told in (
        (["nameless"], "allowed: NAME=DIR"),
        (["a=x", "a=y"], "given twice"),
        ([f"a={tmp_path / 'nothing'}"], "nothing"),
    ):
        given = [part for bundle in bundles for part in ("--bundle", bundle)]
        assert main([*command, *given]) != 0
        assert told in capsys.readouterr().err


def test_a_missing_bundle_is_told_before_the_work(
    made: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(checkpoint), str(made / "adapter"), "--task", "sentiment", "--engine", "onnx"]
    command += ["--test", str(made / "test.jsonl"), "-o", str(tmp_path / "out")]
    command += ["--bundle", f"merged={made / 'merged'}", "--bundle", f"gone={made / 'gone'}"]
    assert main(command) != 0
    told = capsys.readouterr().err
    assert "gone: no such bundle directory" in told
    assert "PyTorch" not in told  # the first step
