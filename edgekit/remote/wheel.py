"""The wheel of the edgekit that runs here, for a device that has none.

The same files give the same wheel, bit by bit, so a device can tell by its hash what it has.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib.metadata import Distribution, PackagePath, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from edgekit.command import last_line
from edgekit.errors import EngineError

__all__ = ["write_wheel"]

NAME = "edgekit-lm"
EPOCH = "315532800"  # 1980, where zip's calendar begins
OF_THIS_INSTALLATION = ("INSTALLER", "RECORD", "REQUESTED", "direct_url.json")


def write_wheel(folder: Path) -> Path:
    """Write the wheel.

    Args:
        folder: where to.

    Returns:
        Its path.

    Raises:
        EngineError: if pip cannot build it, with its last line.
    """
    installed = distribution(NAME)
    project = _project(installed)
    return _packed(installed, folder) if project is None else _built(project, folder)


def _project(installed: Distribution) -> Path | None:
    """The directory of an editable installation; None: the files were copied into place."""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlsplit(origin["url"]).path))


def _built(project: Path, folder: Path) -> Path:
    """Built by pip from a copy of what belongs to it: setuptools leaves files where it builds."""
    with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
        _copy_source(project, Path(work))
        command = [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
            "--disable-pip-version-check", "--wheel-dir", str(folder), work,
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, check=False,
            env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        )  # fmt: skip
    if done.returncode:
        raise EngineError(f"{project}: pip could not build the wheel: {last_line(done.stderr)}")
    return next(folder.glob("*.whl"))


def _copy_source(project: Path, work: Path) -> None:
    tables = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    facts = tables["project"]
    for name in ("pyproject.toml", facts["readme"], *facts["license-files"]):
        shutil.copy2(project / name, work / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in tables["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(project / name, work / name, symlinks=True, ignore=ignored)


def _packed(installed: Distribution, folder: Path) -> Path:
    """Packed from the files that were installed from a wheel, the way that they were in it."""
    files = [path for path in installed.files or () if _was_in_wheel(path)]
    info = next(path.parent for path in files if path.name == "METADATA")
    record = "".join(f"{p},{_hash(p)},{'' if p.size is None else p.size}\n" for p in files)
    wheel = folder / f"{info.stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(files):
            _add(archive, str(path), path.read_binary())
        _add(archive, f"{info}/RECORD", f"{record}{info}/RECORD,,\n".encode())
    return wheel


def _was_in_wheel(path: PackagePath) -> bool:
    made = path.parts[0] == ".." or "__pycache__" in path.parts
    return not made and path.name not in OF_THIS_INSTALLATION


def _hash(path: PackagePath) -> str:
    return f"{path.hash.mode}={path.hash.value}" if path.hash else ""


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """With a date of its own, not today's."""
    archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
