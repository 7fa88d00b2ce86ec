"""`optimum-cli edgekit` is `edgekit`: the same help, results, errors and exit codes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.bundle import check_files, read_manifest

pytestmark = pytest.mark.peer

OPTIMUM = "from optimum.commands.optimum_cli import main; main()"
EDGEKIT = "import sys; from edgekit.cli.main import main; sys.exit(main())"
HEAVY = ("edgekit.cli.main", "edgekit.runtime", "edgekit.export", "openvino", "onnxruntime")
LISTED = f"""
import contextlib, sys
with contextlib.suppress(SystemExit):
    {OPTIMUM}
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Done]:
    """`run(OPTIMUM, "edgekit", "--help")` in an empty directory."""

    def python(code: str, *arguments: str | Path) -> Done:
        command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return python


def test_optimum_lists_it_and_imports_nothing_heavy(run: Callable[..., Done]) -> None:
    listed = run(LISTED, "--help")
    assert listed.returncode == 0, listed.stderr
    assert "edgekit" in listed.stdout
    assert listed.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["profile", "--help"],
        ["convert", "--help"],
        ["--version"],
        ["targets", "--json"],
        [],
        ["profile"],
        ["convert", "nowhere", "-o", "out"],
        ["convert", "nowhere", "-o", "out", "--weights", "int3"],
        ["--debug", "inspect", "nowhere"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_it_says_what_edgekit_says(arguments: list[str], run: Callable[..., Done]) -> None:
    expected = run(EDGEKIT, *arguments)
    done = run(OPTIMUM, "edgekit", *arguments)
    assert done.returncode == expected.returncode
    assert done.stdout == expected.stdout
    assert _message(done) == _message(expected)


def test_an_error_is_one_line(run: Callable[..., Done]) -> None:
    done = run(OPTIMUM, "edgekit", "convert", "nowhere", "-o", "out")
    assert done.returncode == 1
    assert _message(done).startswith("edgekit: error: nowhere: ")
    assert "Traceback" not in done.stderr
    assert run(OPTIMUM, "edgekit", "convert", "--weights", "int3").returncode == 2


def test_it_converts(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, run: Callable[..., Done]
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    settings = ("--weights", "fp32", "--mixer", "lawcat", "--no-verify", "--format", "openvino")
    done = run(OPTIMUM, "edgekit", "convert", source, "-o", out, *settings)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    check_files(out, manifest, manifest.files)
    assert set(manifest.mixers) == {"lawcat"}
    assert "not verified" in done.stdout


def _message(done: Done) -> str:
    """The last line on stderr: Optimum's own imports may warn before it."""
    return (done.stderr.splitlines() or [""])[-1]
