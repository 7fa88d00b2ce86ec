"""What the trainer imports beyond torch and numpy, in one archive for another machine."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgekit.errors import UsageError
from edgekit.sources.gguf import cache_directory

__all__ = ["HERE", "archive", "requirements"]

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
ROOTS = ("accelerate", "gguf", "jinja2", "peft", "rich", "safetensors", "tokenizers")
# What the far machine has, and what works with a network only.
LEFT_OUT = ("torch", "numpy", "triton", "hf-xet")
PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux_2_5", "manylinux1")


def requirements(
    python: str, roots: Sequence[str] = ROOTS, left_out: Sequence[str] = LEFT_OUT
) -> dict[str, str]:
    """Versions of packages and all that they need, as they are installed here.

    Args:
        python: minor version of the far machine.
        roots: where to begin.
        left_out: neither these nor what only they need.

    Raises:
        UsageError: if one is not installed.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found or name in left_out:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError as cause:
            raise UsageError(f"{name} is not installed; pip install 'edgekit-lm[train]'") from cause
        found[name] = distribution.version
        for text in distribution.requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate(environment):
                waiting.append(need.name)
    return dict(sorted(found.items()))


def archive(python: str) -> Path:
    """A zip of the packages for Python `python` on x86-64 Linux, kept in edgekit's cache.

    For the Python that runs here the installed files are taken, for another one pip gets wheels.

    Raises:
        UsageError: if pip cannot get one.
    """
    wanted = requirements(python)
    digest = hashlib.sha256(repr((python, wanted)).encode()).hexdigest()[:16]
    final = cache_directory() / "burst" / f"{digest}.zip"
    if not final.is_file():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent) as folder:
            if python == HERE:
                files = _installed(wanted)
            else:
                files = _downloaded(wanted, python, Path(folder) / "site")
            _write(files, Path(folder) / final.name)
            os.replace(Path(folder) / final.name, final)
    return final


def _installed(wanted: Iterable[str]) -> Iterator[tuple[str, Path]]:
    for name in wanted:
        for file in metadata.distribution(name).files or ():
            if ".." not in file.parts:  # scripts
                yield file.as_posix(), Path(str(file.locate()))


def _downloaded(wanted: dict[str, str], python: str, site: Path) -> Iterator[tuple[str, Path]]:
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--implementation", "cp"]
    options += [f"--platform={platform}_x86_64" for platform in PLATFORMS]
    options += [f"--python-version={python}", f"--target={site}"]
    pins = [f"{name}=={version}" for name, version in wanted.items()]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *options, *pins]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise UsageError(f"pip found no packages for Python {python} ({reason})")
    for path in site.rglob("*"):
        if path.is_file():
            yield path.relative_to(site).as_posix(), path


def _write(files: Iterable[tuple[str, Path]], out: Path) -> None:
    """The same bytes for the same files: entries in order, without times."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name, path in sorted(set(files)):
            if "__pycache__" not in name and path.is_file():
                target.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)
