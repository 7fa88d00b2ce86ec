"""The layout holds: packages listed, links true, the device side free of torch, short files."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPED = dict(PROJECT["tool"]["setuptools"]["package-dir"])
PLUGIN = "optimum.commands.register"  # a folder of another project's namespace, no package of ours
PLUGIN_FOLDER = ROOT / MAPPED.pop(PLUGIN)
LINKS = sorted(name.partition(".")[2] for name in MAPPED if "." in name)
HEAVY = ("torch", "transformers", "onnx", "triton", "peft")
MAX_LINES = 400


def real_packages() -> set[str]:
    found = set()
    for package, folder in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder)
            linked = any((ROOT / folder / part).is_symlink() for part in inside.parts[:1])
            if not linked:
                found.add(".".join((package, *inside.parts)))
    return found


def python_outside(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_every_package_is_listed_and_nothing_else() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {*real_packages(), PLUGIN}


def test_the_plugin_folder_hides_no_other_plugins() -> None:
    assert [path.name for path in PLUGIN_FOLDER.glob("*.py")] == ["register_edgekit.py"]


@pytest.mark.skipif(sys.platform == "win32", reason="links are text files there")
@pytest.mark.parametrize("name", LINKS)
def test_link_leads_to_its_folder(name: str) -> None:
    assert (ROOT / "edgekit" / name).is_symlink()
    assert (ROOT / "edgekit" / name).resolve() == ROOT / name


@pytest.mark.parametrize(
    "module",
    [
        "edgekit",
        "edgekit.runtime",
        "edgekit.runtime.latency",
        "edgekit.targets",
        "edgekit.cli.main",
    ],
)
def test_device_side_imports_without_torch(module: str, tmp_path: Path) -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); import {module}"
    done = python_outside(blocked, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LINKS)
def test_bare_names_are_not_importable(name: str, tmp_path: Path) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
    assert python_outside(code, tmp_path).returncode == 0
    assert importlib.util.find_spec(name) is None


@pytest.mark.parametrize(
    "path",
    [p for top in ("edgekit", *LINKS, "tests") for p in sorted((ROOT / top).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_file_is_short_enough_to_read(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES
