import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Edgekit = Callable[..., Any]
SMALL = ("--cpu", "--precision", "fp32", "--set", "steps=6", "--set", "batch=4",
         "--set", "micro_batch=4", "--set", "rank=2")  # fmt: skip


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    lines = [{"prompt": f"{i}", "completion": f" {i % 2}"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tune_with_a_search_tells_what_it_took(
    edgekit: Edgekit, checkpoint: Path, examples: Path, tmp_path: Path
) -> None:
    options = ("--data", examples, "--method", "lora", "--lr-search", "1e-6,1e-3,1e-2", *SMALL)
    done = edgekit("tune", checkpoint, "-o", tmp_path / "a", *options)
    assert done.code == 0, done.err
    assert "lora, tune" in done.out
    assert done.out.count("held-out loss") == 3
    assert "elements to" in done.out
    assert "tuning: loss" in done.err
    again = edgekit("tune", checkpoint, "-o", tmp_path / "a", *options)
    assert again.code == 1
    assert "--force" in again.err
    report = edgekit("tune", checkpoint, "-o", tmp_path / "a", *options, "--force", "--json").json
    written = json.loads((tmp_path / "a" / "tune.json").read_text())
    assert report["manifest"] == written
    assert report["finished"]


def test_a_method_picks_its_recipe_and_a_recipe_may_be_a_file(
    edgekit: Edgekit, checkpoint: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('description = "x"\nmethod = "lora"\nrank = 4\nsteps = 1\n')
    options = ("--data", examples, "--recipe", recipe, "--method", "vera", "--cpu", "--json")
    done = edgekit("tune", checkpoint, "-o", tmp_path / "a", *options)
    assert done.code == 0, done.err
    found = done.json["manifest"]["recipe"]
    assert (found["name"], found["method"], found["rank"]) == ("mine", "vera", 4)


def test_a_stopped_run_says_how_to_go_on(
    edgekit: Edgekit, checkpoint: Path, examples: Path, tmp_path: Path
) -> None:
    options = ("--data", examples, *SMALL, "--set", "steps=100000")
    done = edgekit("tune", checkpoint, "-o", tmp_path / "a", *options, "--stop-after", "1")
    assert done.code == 0, done.err
    assert "the same command with --resume goes on" in done.out
    assert not (tmp_path / "a").exists()
    refused = edgekit("tune", checkpoint, "-o", tmp_path / "a", *options)
    assert refused.code == 1
    assert "--resume goes on with it, --force starts again" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", 'targets=["conv_q"]'), "target 'conv_q' given; allowed: q_proj"),
        (("--recipe", "magic"), "recipe 'magic' is unknown; known: aflora"),
        (("--lr-search", "fast"), "'fast' given; allowed: rates separated by commas"),
        (("--lr-search", "1e-3"), "allowed: 3 or more different ones"),
        (("--method", "dora"), "invalid choice: 'dora'"),
        (("--set", "length=3"), "tokens, length 3; nothing is cut"),
        (("--held-out", "none.jsonl"), "none.jsonl: cannot be read"),
    ],
    ids=["target", "recipe", "rates", "few-rates", "method", "length", "held-out"],
)
def test_tune_refuses(
    edgekit: Edgekit,
    checkpoint: Path,
    examples: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    done = edgekit("tune", checkpoint, "-o", tmp_path / "a", "--data", examples, *options)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tune_needs_data(edgekit: Edgekit, checkpoint: Path, tmp_path: Path) -> None:
    done = edgekit("tune", checkpoint, "-o", tmp_path / "a")
    assert done.code == 2
    assert "no data given; give --data FILE.jsonl" in done.err
