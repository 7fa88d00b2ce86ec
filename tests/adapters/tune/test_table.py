"""The comparison: equal steps, tuned rates, seeds; resumable; told as text, data and picture."""

import json
from pathlib import Path

import pytest

from edgekit.adapters.tune.manifest import read_tune
from edgekit.adapters.tune.report import rows_of
from edgekit.adapters.tune.table import main
from edgekit.data.tuning_tasks import LABELS, PARTS
from edgekit.wilson import wilson


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task, completions in (("sentiment", LABELS), ("restore", (" Yes.", " No."))):
        (folder / task).mkdir()
        for part in PARTS:
            lines = [
                {"id": f"{part}-{i}", "prompt": f"{i}:", "completion": completions[i % 2]}
                for i in range(12)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / task / f"{part}.jsonl").write_text(text)
    return folder


def command(checkpoint: Path, tasks: Path, out: Path, *more: str) -> list[str]:
    return [
        str(checkpoint), "-o", str(out), "--tasks", str(tasks), "--cpu", "--precision", "fp32",
        "--batch", "4", "--steps", "5", "--search-steps", "5", "--test", "8", "--validation", "6",
        "--set", "rank=2", *more,
    ]  # fmt: skip


def test_one_command_makes_the_table(
    checkpoint: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = command(checkpoint, tasks, out, "--method", "lora,aflora", "--seeds", "0,3")
    assert main([*arguments, "--task", "sentiment"]) == 0
    capsys.readouterr()
    assert main(arguments) == 0  # the other task too
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() == printed
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((out / "table.json").read_text())
    assert [r["method"] for r in data["rows"]["sentiment"]] == ["base", "lora", "aflora"]
    for task in ("sentiment", "restore"):
        records = data["records"][task]
        assert [(r["method"], r["seed"]) for r in records[1:]] == [
            ("lora", 0), ("lora", 3), ("aflora", 0), ("aflora", 3),
        ]  # fmt: skip
        for record in records[1:]:
            manifest = read_tune(out / "adapters" / task / f"{record['method']}-{record['seed']}")
            assert (manifest.steps, manifest.recipe["rank"]) == (5, 2)
            assert manifest.recipe["lr"] == record["lr"]
            assert record["memory"]["peak"] == manifest.memory.peak
            assert len(record["search"]) == (3 if record["seed"] == 0 else 0)
        assert len({r["lr"] for r in records[1:3]}) == 1
    assert "of 8 |" in printed
    assert "| character errors |" in printed
    # Nothing is done twice: the same command only writes the same table.
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed
    assert main([*arguments, "--steps", "6"]) == 2
    assert "begun with other settings (steps: 5 there, 6 now)" in capsys.readouterr().err


def test_a_killed_comparison_goes_on_with_the_adapters_it_has(
    checkpoint: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = command(checkpoint, tasks, out, "--method", "vera", "--task", "sentiment")
    assert main([*arguments, "--seeds", "0"]) == 0
    journal = out / "sentiment.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]) + '{"me')
    adapter = out / "adapters" / "sentiment" / "vera-0" / "tune.json"
    before = adapter.stat().st_mtime_ns
    assert main([*arguments, "--seeds", "0,1"]) == 0
    assert adapter.stat().st_mtime_ns == before
    assert "| vera |" in capsys.readouterr().out


def record(method: str, seed: int, correct: int, **more: object) -> dict[str, object]:
    training = {
        "lr": 0.1,
        "trainable": {"start": 10 * (seed + 1), "end": 2, "mean": 5.0},
        "memory": {"peak": 100 + seed},
        "seconds_per_step": float(seed),
    }
    scores = {"correct": correct, "samples": 10, "character_error_rate": None}
    return {"method": method, "seed": seed, **scores, **training, **more}


def test_rows_are_means_and_the_interval_is_of_the_examples() -> None:
    records = [record("lora", seed, correct) for seed, correct in enumerate((5, 7, 9))]
    (row,) = rows_of(records)
    assert (row.share, row.interval) == (pytest.approx(0.7), wilson(7, 10))
    assert row.shares == (0.5, 0.7, 0.9)
    assert row.trainable == {"start": 20, "end": 2, "mean": 5.0}
    assert (row.peak_bytes, row.seconds_per_step) == (102, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "poetry"), "tasks 'poetry' given; allowed: sentiment, restore"),
        (("--method", "dora"), "methods 'dora' given; allowed: aflora, lora, vera"),
        (("--seeds", "1,1"), "seeds (1, 1) given"),
        (("--steps", "0"), "steps 0 given; allowed: 1 or more"),
        (("--rates", "lora=1e-3,1e-2", "--method", "lora"), "allowed: 3 or more different ones"),
    ],
    ids=["task", "method", "seeds", "steps", "rates"],
)
def test_wrong_usage(
    checkpoint: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert main(command(checkpoint, tasks, tmp_path / "out", *arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_tasks(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(checkpoint, tmp_path, tmp_path / "out")) == 2
    assert "python -m edgekit.data.tuning_tasks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(checkpoint), "-o", "x", "--rates", "lora=fast"])
    assert "'lora=fast' given; allowed: METHOD=LR,LR,LR" in capsys.readouterr().err
