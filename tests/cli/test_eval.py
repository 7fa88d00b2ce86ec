import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.cli.eval import NEEDLES as TASKS
from edgekit.data.needles import KINDS

Edgekit = Callable[..., Any]
TEXT = "The capital of France is Paris. "
NEEDLES = ("--lengths", "400,500", "--samples", "4", "--depths", "2", "--max-new-tokens", "4")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 60)
    return path


@pytest.mark.parametrize("task", ["passkey", "niah-2"])
def test_needles_print_a_table_and_write_json_journal_and_plot(
    edgekit: Edgekit, lawcat_bundle: Path, text: Path, tmp_path: Path, task: str
) -> None:
    out, plot = tmp_path / "r.json", tmp_path / "r.png"
    command = ("eval", lawcat_bundle, "--task", task, *NEEDLES, "-o", out, "--plot", plot)
    done = edgekit(*command, "--haystack", text)
    assert done.code == 0, done.err
    assert [line.split()[:3] for line in done.out.splitlines()[1:3]] == [
        ["400", "4", "0"],
        ["500", "4", "0"],
    ]
    assert "0.0% to 49.0%" in done.out
    assert "at most 4 new tokens, 2 depths, seed 0" in done.out
    written = json.loads(out.read_text())
    assert [cell["samples"] for cell in written["cells"]] == [4, 4]
    assert written["settings"]["task"] == task
    assert len((tmp_path / "r.samples.jsonl").read_text().splitlines()) == 9
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = edgekit(*command, "--haystack", text, "--json")
    assert again.json["cells"] == written["cells"]  # seconds too: nothing was answered twice
    changed = edgekit(*command, "--haystack", text, "--seed", "1")
    assert changed.code == 2
    assert "begun with other settings (seed: 0 there, 1 now)" in changed.err


def test_length_over_the_context_is_in_the_table(edgekit: Edgekit, bundle: Path) -> None:
    done = edgekit("eval", bundle, "--task", "passkey", *NEEDLES, "--lengths", "400,600")
    assert done.code == 0, done.err
    assert "over the context limit of 512 tokens" in done.out


def test_agreement_of_a_bundle_with_its_source(
    edgekit: Edgekit, bundle: Path, checkpoint: Path, text: Path
) -> None:
    command = ("eval", bundle, "--task", "agreement", "--text", text, "--window", "64")
    done = edgekit(*command, "--teacher", checkpoint, "--json")
    assert done.code == 0, done.err
    assert done.json["top1"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert done.json["kl"]["value"] == pytest.approx(0, abs=1e-6)
    table = edgekit(*command, "--teacher", checkpoint, "--engine", "onnx").out
    assert "top1              1.0000 (1.0000 to 1.0000)" in table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task", "perplexity"), "task perplexity reads a text; give it with --text"),
        (("--task", "agreement", "--text", "t"), "--teacher is for agreement"),
        (("--task", "perplexity", "--text", "t", "--teacher", "x"), "--teacher is for agreement"),
        (("--task", "perplexity", "--text", "t", "--plot", "p"), "--plot given for perplexity"),
        (("--task", "niah-2"), "task niah-2 needs an essay; give a text file with --haystack"),
        (("--task", "niah-2", "--haystack", "nowhere"), "nowhere: cannot be read"),
        (("--task", "passkey", "--samples", "0"), "samples 0 given; allowed: 1 or more"),
        (("--task", "passkey", "--lengths", "100"), "length 100 given for passkey"),
        (("--task", "passkey", "--lengths", "0"), "lengths 0 given; allowed: 1 or more"),
        (("--task", "passkey", "--base", "x"), "base x given for"),
        (("--task", "passkey", "-o", "nowhere/x.json"), "there is no folder nowhere; make it"),
        (("--task", "passkey", "--plot", "nowhere/x.png"), "there is no folder nowhere; make it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage(
    edgekit: Edgekit, lawcat_bundle: Path, flags: tuple[str, ...], message: str
) -> None:
    done = edgekit("eval", lawcat_bundle, *flags)
    assert done.code == 2
    assert message in done.err


def test_every_needle_is_a_task() -> None:
    assert TASKS == KINDS
