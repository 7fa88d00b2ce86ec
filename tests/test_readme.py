"""What the README says comes true when typed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    """The real model, converted, asked and streamed as the README shows."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "Paris" in run.stdout.splitlines()[0]


def test_every_file_of_the_tree_exists() -> None:
    """The newcomer's map names what is there."""
    (tree,) = re.findall(r"## What is where\n\n```\n(.*?)```", README, flags=re.DOTALL)
    folder = ROOT
    for line in tree.splitlines():
        names = re.match(r"\s*(\S+(?: \S+)*)", line)
        assert names, line
        if not line.startswith(" "):
            folder = ROOT
        for name in names[1].split():
            assert (folder / name).exists(), f"{name} of line {line!r}"
            if not line.startswith(" ") and name.endswith("/"):
                folder = ROOT / name


def test_every_verb_is_documented() -> None:
    """The table of commands and the command line agree."""
    from edgekit.cli.main import VERBS

    documented = set(re.findall(r"^\| `edgekit (\w+)", README, flags=re.MULTILINE))
    assert documented == set(VERBS)
