"""The on-disk format between export and runtime: manifest, checksums, whole-or-nothing writing.

A bundle is a directory whose `edgekit.json` names every other file with its size and sha256. It is
written to a hidden sibling and renamed when whole, so a reader never sees half of one.
"""

import contextlib
import errno
import glob
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
    "ENGINE_FILES",
    "FORMAT_VERSION",
    "FRESH_STATES",
    "IMAGE_MASS",
    "MANIFEST",
    "MARKERS",
    "FileRecord",
    "Manifest",
    "ModelFacts",
    "StateRecord",
    "VisionFacts",
    "check_files",
    "describe_files",
    "read_manifest",
    "refuse_existing",
    "remove_abandoned",
    "staged",
    "workspace",
    "write_manifest",
]

FORMAT_VERSION = 1
MANIFEST = "edgekit.json"
MARKERS = {  # the file that tells what a directory is
    "bundle": MANIFEST,
    "student": "student.json",
    "adapter": "adapter_config.json",
    "model": "config.json",
}
Kind = Literal["bundle", "student", "adapter", "model"]
PARTIAL, OLD = ".edgekit-partial", ".edgekit-old"  # endings of siblings that live during a write
ENGINE_FILES = {
    "openvino": ("openvino_model.xml", "openvino_model.bin"),
    "onnx": ("model.onnx", "model.onnx.data"),
}
VISION_ENGINE_FILES = {  # of a vision-language model: the language, its token table, the pictures
    "openvino": tuple(
        f"openvino_{part}_model.{ending}"
        for part in ("language", "text_embeddings", "vision_embeddings")
        for ending in ("xml", "bin")
    ),
    "onnx": tuple(
        f"{part}.onnx{ending}"
        for part in ("model", "embedding", "vision")
        for ending in ("", ".data")
    ),
}
MERGER_FILES = tuple(f"openvino_vision_embeddings_merger_model.{e}" for e in ("xml", "bin"))
IMAGE_MASS = "image_mass"  # output: the share of attention that the last position gives to pictures
FRESH_STATES = "edgekit.fresh_states"  # an ONNX model's metadata: no buffer is past and present


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
        kind: `conv`, `ssm` and `spin` are constant in size; `key` and `value` grow along axis 2.
        openvino: the variable's name in the IR.
        onnx: input and output name in the ONNX graph.
        shape: -1 for the batch and for a growing axis.
        onnx_shape: the same in the ONNX graph, where it differs; None: `shape`.
    """

    layer: int
    kind: Literal["conv", "ssm", "key", "value", "spin"]
    openvino: str
    onnx: tuple[str, str]
    shape: tuple[int, ...]
    dtype: Literal["float32"] = "float32"
    onnx_shape: tuple[int, ...] | None = None

    def shape_on(self, engine: str) -> tuple[int, ...]:
        """The shape in the graph of `engine`."""
        return self.onnx_shape if engine == "onnx" and self.onnx_shape else self.shape


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
class VisionFacts:
    """How a picture comes into a prompt.

    Attributes:
        family: of the whole model, such as `llava`; the decoder's own is in `ModelFacts`.
        image_token_id: stands for one embedding of a picture among token ids.
        image_token: the same as text.
        tokens: embeddings of one picture; None: as its size says, in patches.
        placeholder: stands for a picture in a prompt and in what the chat template writes.
        inserted: what is put before a prompt without placeholders, for each picture.
        before: text that comes before the image tokens when they replace a placeholder.
        after: text that comes after them.
        merge: patches along each side of one embedding, where pictures have any size and positions
            three axes; None: pictures have one size.
        image_mass: whether the decoder's graphs say with every token how far it looks at pictures:
            the mean share of the attention of SPIN's heads.
    """

    family: str
    image_token_id: int
    image_token: str
    tokens: int | None
    placeholder: str
    inserted: str
    before: str = ""
    after: str = ""
    merge: int | None = None
    image_mass: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of `edgekit.json`.

    `adapter_slots` has `(out, in)` of each module that takes adapters at run time; `vision` is None
    for a model that reads no pictures.
    """

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
    adapter_slots: dict[str, tuple[int, int]] = field(default_factory=dict)
    vision: VisionFacts | None = None

    def engine_files(self, engine: str) -> tuple[str, ...]:
        """The graphs and weights of one engine, those that may not be there included."""
        if self.vision is None:
            return ENGINE_FILES[engine]
        merging = engine == "openvino" and self.vision.merge is not None
        return VISION_ENGINE_FILES[engine] + MERGER_FILES * merging

    @property
    def fingerprint(self) -> str:
        """sha256 over the file records: equal only for bundles that compute the same thing."""
        records = json.dumps(config.dump(self.files), sort_keys=True)
        return hashlib.sha256(records.encode()).hexdigest()

    @property
    def constant_memory(self) -> bool:
        """Whether no state grows with the sequence."""
        return all(state.kind not in ("key", "value") for state in self.states)


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
    except (ValueError, OSError, RecursionError) as cause:
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
    if not parts or Path(name).is_absolute() or ".." in parts or set("\\\0") & set(name):
        raise BundleError(
            f"{directory / MANIFEST}: file name {name!r} leads outside the bundle; refused"
        )
    path = directory / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
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
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise BundleError(f"{path}: cannot be read ({cause.strerror})") from cause


@contextlib.contextmanager
def staged(out: Path | str, *, force: bool = False, kind: Kind = "bundle") -> Iterator[Path]:
    """A directory to fill; it becomes `out` when the block ends well and vanishes otherwise.

    What an earlier run left because it was killed is put right first. A link at `out` is followed.

    Args:
        out: the directory to make; missing parents are made, and removed again on failure.
        force: replace an existing directory of this kind (never any other directory).
        kind: what is being written, which `MARKERS` tell apart.

    Raises:
        BundleError: if `out` exists and may not be replaced, or cannot be written.
    """
    final = Path(os.path.realpath(out))  # the work must lie on the disk that it is renamed on
    with contextlib.ExitStack() as undo:
        try:
            _recover(final)
            refuse_existing(final, force, kind)
            undo.callback(_remove_empty, _missing(final.parent))
            final.parent.mkdir(parents=True, exist_ok=True)
            work = undo.enter_context(workspace(final))
            yield work
            work.chmod(0o755)
            _flush(work)
            refuse_existing(final, force, kind)
            _swap(work, final)
        except OSError as cause:
            raise BundleError(
                f"{out}: could not be written ({_reason(cause)}); nothing changed"
            ) from cause


@contextlib.contextmanager
def workspace(final: Path) -> Iterator[Path]:
    """A hidden sibling of `final` to fill and rename; removed at the end if it is still there.

    It is locked meanwhile, so that `remove_abandoned` can tell it from what a killed run left.

    Args:
        final: what the caller renames it to; its parent exists.

    Raises:
        OSError: if it cannot be made.
    """
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=PARTIAL, dir=final.parent))
    lock = _claim(work)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove the workspaces in `folder` that a killed run left.

    Args:
        folder: where they lie; it need not exist.
        name: of what they were to become; empty for all.
    """
    prefix = f".{glob.escape(name)}." if name else "."
    for partial in folder.glob(f"{prefix}*{PARTIAL}"):
        lock = _claim(partial)
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _reason(cause: OSError) -> str:
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    if isinstance(cause, FileExistsError | NotADirectoryError):
        return "a part of the path is no directory"
    about = f": {Path(os.fsdecode(cause.filename)).name}" if cause.filename else ""
    return f"{cause.strerror}{about}" if cause.strerror else str(cause)


def _missing(directory: Path) -> list[Path]:
    """`directory` and its parents, as far as they do not exist, deepest first."""
    return [path for path in (directory, *directory.parents) if not os.path.lexists(path)]


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        with contextlib.suppress(OSError):
            path.rmdir()


def refuse_existing(out: Path, force: bool, kind: str) -> None:
    """Fail early where `staged` would fail at the end of long work.

    Raises:
        BundleError: if `out` exists and may not be replaced.
    """
    if not os.path.lexists(out):
        return
    if out.is_mount():
        raise BundleError(f"{out}: is a mount point; choose the name of a directory in it")
    if not force:
        raise BundleError(
            f"{out}: exists already; choose another name or pass --force to replace it"
        )
    if not (out.is_dir() and ((out / MARKERS[kind]).is_file() or not any(out.iterdir()))):
        raise BundleError(f"{out}: is not an edgekit {kind}, so --force will not replace it")


def _claim(directory: Path) -> int | None:
    """Lock `directory` until the returned descriptor is closed or this process ends.

    The kernel lets go of it even after SIGKILL, and a process in another container cannot be
    mistaken for ours, as with a process id.

    Returns:
        None if another process holds it or removed it, or where the file system has no locks.
    """
    import fcntl  # not on Windows, where this module is read but nothing is staged

    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _recover(out: Path) -> None:
    """Undo what a killed run left: its partial directory, or an old bundle set aside."""
    old = _aside(out)
    if old.is_dir() and not os.path.lexists(out):
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    remove_abandoned(out.parent, out.name)


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}{OLD}"


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _swap(work: Path, out: Path) -> None:
    old = _aside(out)
    if os.path.lexists(out):
        out.rename(old)
    try:
        work.rename(out)
    finally:
        if old.is_dir() and not os.path.lexists(out):
            old.rename(out)
    shutil.rmtree(old, ignore_errors=True)
