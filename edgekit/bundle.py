"""The on-disk format between export and runtime: manifest, checksums, whole-or-nothing writing.

A bundle is a directory whose `edgekit.json` names every other file with its size and sha256. It is
written to a hidden sibling and renamed when whole, so a reader never sees half of one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekit import config
from edgekit.errors import BundleError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "ModelFacts",
    "StateRecord",
    "check_files",
    "describe_files",
    "read_manifest",
    "staged",
    "write_manifest",
]

FORMAT_VERSION = 1
MANIFEST = "edgekit.json"
ENGINE_FILES = {
    "openvino": ("openvino_model.xml", "openvino_model.bin"),
    "onnx": ("model.onnx", "model.onnx.data"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StateRecord:
    """One carried tensor.

    Attributes:
        layer: which decoder layer owns it.
        kind: `conv` and `ssm` are constant in size; `key` and `value` grow along axis 2.
        openvino: the variable's name in the IR.
        onnx: input and output name in the ONNX graph.
        shape: -1 for the batch and for a growing axis.
    """

    layer: int
    kind: Literal["conv", "ssm", "key", "value"]
    openvino: str
    onnx: tuple[str, str]
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What the device must know; `context_length` is None when memory is constant."""

    family: str
    vocab_size: int
    num_layers: int
    context_length: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    inputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of `edgekit.json`."""

    format_version: int
    source: dict[str, Any]
    model: ModelFacts
    mixers: tuple[str, ...]
    states: tuple[StateRecord, ...]
    weights: str
    engines: tuple[str, ...]
    target: str
    pipeline: tuple[dict[str, Any], ...]
    versions: dict[str, str]
    files: dict[str, FileRecord]
    verification: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 over the file records: equal only for bundles that compute the same thing."""
        records = json.dumps(config.dump(self.files), sort_keys=True)
        return hashlib.sha256(records.encode()).hexdigest()

    @property
    def constant_memory(self) -> bool:
        """Whether no state grows with the sequence."""
        return all(state.kind in ("conv", "ssm") for state in self.states)


def read_manifest(directory: Path | str) -> Manifest:
    """Read and check `edgekit.json`; the other files are checked by `check_files`.

    Raises:
        BundleError: if it is missing, damaged, of another format version, or names a file outside.
    """
    path = Path(directory) / MANIFEST
    if not Path(directory).is_dir():
        raise BundleError(f"{directory}: no such bundle directory; make one with `edgekit convert`")
    if not path.is_file():
        raise BundleError(f"{directory}: not an edgekit bundle ({MANIFEST} is missing)")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as cause:
        raise BundleError(f"{path}: damaged ({cause}); convert the model again") from cause
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: bundle format {version!r}, this edgekit reads {FORMAT_VERSION}; convert again"
        )
    manifest = config.load(Manifest, data, where=str(path), error=BundleError)
    for name in manifest.files:
        _inside(Path(directory), name)
    return manifest


def _inside(directory: Path, name: str) -> Path:
    """The file `name` of the bundle, refused if it is not a plain path within it."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name:
        raise BundleError(
            f"{directory / MANIFEST}: file name {name!r} leads outside the bundle; refused"
        )
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise BundleError(f"{path}: a link that leads outside the bundle; refused")
    return path


def check_files(
    directory: Path | str, manifest: Manifest, names: Iterator[str] | None = None
) -> None:
    """Compare files with their records.

    Args:
        directory: the bundle.
        manifest: its manifest.
        names: which files; None for all.

    Raises:
        BundleError: naming the first file that is missing or differs.
    """
    for name in manifest.files if names is None else names:
        record = manifest.files.get(name)
        if record is None:
            raise BundleError(f"{directory}: {name} is not part of this bundle")
        path = _inside(Path(directory), name)
        if not path.is_file():
            raise BundleError(f"{path}: missing; convert the model again")
        size = path.stat().st_size
        if size != record.size:
            raise BundleError(
                f"{path}: damaged ({size} bytes, {record.size} expected); convert again"
            )
        if _sha256(path) != record.sha256:
            raise BundleError(
                f"{path}: damaged (its sha256 differs from the manifest); convert again"
            )


def describe_files(directory: Path) -> dict[str, FileRecord]:
    """Records of every file in `directory` except the manifest itself."""
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    return {
        name: FileRecord(size=(directory / name).stat().st_size, sha256=_sha256(directory / name))
        for name in names
        if name != MANIFEST
    }


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `edgekit.json`."""
    text = json.dumps(config.dump(manifest), indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def staged(out: Path | str, *, force: bool = False) -> Iterator[Path]:
    """A directory to fill; it becomes `out` when the block ends well and vanishes otherwise.

    Args:
        out: the directory to make.
        force: replace an existing bundle (never any other directory).

    Raises:
        BundleError: if `out` exists and may not be replaced, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    _recover(out)
    _refuse_existing(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(
            tempfile.mkdtemp(prefix=_prefix(out), suffix=f".{os.getpid()}.partial", dir=out.parent)
        )
    except OSError as cause:
        raise BundleError(f"{out}: cannot be written ({cause.strerror})") from cause
    try:
        yield work
        work.chmod(0o755)
        _flush(work)
        _swap(work, out)
    except OSError as cause:
        raise BundleError(
            f"{out}: could not be written ({cause.strerror or cause}); nothing changed"
        ) from cause
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}."


def _refuse_existing(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        raise BundleError(
            f"{out}: exists already; choose another name or pass --force to replace it"
        )
    if not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise BundleError(f"{out}: is not an edgekit bundle, so --force will not replace it")


def _recover(out: Path) -> None:
    """Undo what a killed run left: its partial directory, or an old bundle set aside."""
    old = out.parent / f"{_prefix(out)}old"
    if old.is_dir() and not os.path.lexists(out):
        old.rename(out)
    for partial in out.parent.glob(f"{_prefix(out)}*.partial"):
        owner = partial.name.split(".")[-2]
        if not (owner.isdigit() and Path(f"/proc/{owner}").exists()):
            shutil.rmtree(partial, ignore_errors=True)


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _swap(work: Path, out: Path) -> None:
    old = out.parent / f"{_prefix(out)}old"
    if os.path.lexists(out):
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)
