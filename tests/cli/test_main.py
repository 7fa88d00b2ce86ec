import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit import __version__
from edgekit.cli.main import VERBS

Edgekit = Callable[..., Any]
HEAVY = ("numpy", "torch", "transformers", "openvino", "onnxruntime", "onnx", "tokenizers", "rich")
ENGINES = ("openvino", "onnxruntime")


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", [None, *VERBS], ids=str)
def test_help_exits_zero_and_loads_nothing_heavy(verb: str | None, tmp_path: Path) -> None:
    arguments = ["--help"] if verb is None else [verb, "--help"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"
    done = python(f"{blocked}; from edgekit.cli.main import main; main({arguments!r})", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: edgekit")


def test_version(edgekit: Edgekit, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        edgekit("--version")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"edgekit {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "required: BUNDLE, -p/--prompt"),
        (["convert", "a"], "required: -o/--output"),
        (["convert", "a", "-o", "b", "--softmax-layers", "7-5"], "such as 0,5-7"),
        (["convert", "a", "-o", "b", "--format", "tflite"], "allowed: openvino, onnx"),
        (["convert", "a", "-o", "b", "--weights", "int3"], "invalid choice: 'int3'"),
        (["convert", "a", "-o", "b", "--mix", "lawcat"], "unrecognized arguments: --mix"),
        (["profile", "b", "--depth", "0,4k"], "such as 0,1024"),
        (["profile", "b", "--prompt", "0"], "prompt 0 given; allowed: 1 or more"),
        (["run", "b", "-p", "x", "--threads", "0"], "allowed: a whole number, 1 or more"),
        (["eval", "b", "--task", "telepathy", "--text", "t"], "invalid choice: 'telepathy'"),
        (["targets", "pentium"], "'pentium' is unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    edgekit: Edgekit, arguments: list[str], message: str
) -> None:
    done = edgekit(*arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("edgekit: error: ")
    assert done.err.count("\n") == 1
    assert not done.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "nowhere", "-p", "x"),
        ("chat", "nowhere"),
        ("inspect", "nowhere"),
        ("profile", "nowhere"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_missing_bundle_is_one_line_and_exit_code_1(
    edgekit: Edgekit, arguments: tuple[str, ...]
) -> None:
    done = edgekit(*arguments)
    assert done.code == 1
    assert done.err == (
        "edgekit: error: nowhere: no such bundle directory; make one with `edgekit convert`\n"
    )


def test_debug_shows_the_traceback_as_well(edgekit: Edgekit) -> None:
    for arguments in (("--debug", "inspect", "nowhere"), ("inspect", "--debug", "nowhere")):
        done = edgekit(*arguments)
        assert done.code == 1
        assert "Traceback" in done.err
        assert done.err.splitlines()[-1].startswith("edgekit: error: nowhere")


def test_reader_that_leaves_early_is_no_error(bundle: Path) -> None:
    code = "import sys; from edgekit.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, "inspect", str(bundle), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("engine", "advice"),
    [
        ("openvino", 'pip install "edgekit-lm[openvino]"'),
        ("onnx", 'pip install "edgekit-lm[onnx]"'),
    ],
)
def test_engine_not_installed_says_what_to_install(
    bundle: Path, tmp_path: Path, engine: str, advice: str
) -> None:
    hidden = "import sys; sys.meta_path = [_Hide(f) for f in sys.meta_path]"
    code = f"""
class _Hide:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ENGINES!r}:
            return None
        return self.finder.find_spec(name, path, target)
{hidden}
from edgekit.cli.main import main
sys.exit(main(["run", {str(bundle)!r}, "-p", "x", "--engine", {engine!r}]))
"""
    done = python(code, tmp_path)
    assert done.returncode == 1
    assert advice in done.stderr
    assert done.stderr.count("\n") == 1


def test_convert_without_torch_says_what_to_install(checkpoint: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.meta_path.insert(0, type("Hide", (), {{"find_spec": staticmethod(_absent)}}))
from edgekit.cli.main import main
sys.exit(main(["convert", {str(checkpoint)!r}, "-o", "out"]))
"""
    absent = """
def _absent(name, path=None, target=None):
    if name.split(".")[0] == "torch":
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
"""
    done = python(absent + code, tmp_path)
    assert done.returncode == 1
    assert "torch is not installed" in done.stderr
    assert 'pip install "edgekit-lm[convert]"' in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children can be interrupted, even where the tests run as a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_ends_with_130(lawcat_bundle: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgekit", "run", str(lawcat_bundle), "-p", "x"]
    with subprocess.Popen(
        [*command, "--ignore-eos", "-n", "10000000", "--engine", "openvino"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130
    assert error == b"edgekit: interrupted\n"


def test_text_that_the_terminal_cannot_show_is_no_error(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgekit", "run", str(bundle), "-p", "\u00e9"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "-n", "1", "--json"],
        env=environment,
        capture_output=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert b"user\\n?" in done.stdout


def test_unforeseen_error_is_one_line_too(edgekit: Edgekit, tmp_path: Path) -> None:
    (tmp_path / "edgekit.json").write_text("[" * 100_000)  # deeper than json can follow
    done = edgekit("inspect", tmp_path)
    assert done.code == 1
    assert done.err.startswith("edgekit: error: ")
    assert done.err.count("\n") == 1
