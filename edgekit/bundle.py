"""The on-disk format between export and runtime: manifest and checksums.

A bundle is a directory whose `edgekit.json` names every other file with its size and sha256;
`staging.py` writes it whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekit import config
from edgekit.errors import BundleError
from edgekit.staging import MARKERS

__all__ = [
    "ENGINE_FILES",
    "FORMAT_VERSION",
    "FRESH_STATES",
    "IMAGE_MASS",
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "ModelFacts",
    "StateRecord",
    "TileTexts",
    "VisionFacts",
    "check_files",
    "describe_files",
    "read_manifest",
    "write_manifest",
]

FORMAT_VERSION = 1
MANIFEST = MARKERS["bundle"]
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
class TileTexts:
    """What a prompt says of the tiles of a picture, which come before its small copy.

    Attributes:
        before: comes before the image tokens of a tile; `{row}` and `{column}` in it stand for the
            tile's place, counted from 1.
        row_end: comes after the last tile of a row.
        end: comes after the last row.
    """

    before: str
    row_end: str
    end: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionFacts:
    """How a picture comes into a prompt.

    Attributes:
        family: of the whole model, such as `llava`; the decoder's own is in `ModelFacts`.
        image_token_id: stands for one embedding of a picture among token ids.
        image_token: the same as text.
        tokens: embeddings of one picture, or of each of its squares where it has tiles; None: as
            its size says, in patches.
        placeholder: stands for a picture in a prompt and in what the chat template writes.
        inserted: what is put before a prompt without placeholders, for each picture.
        before: text that comes before the image tokens when they replace a placeholder.
        after: text that comes after them.
        merge: patches along each side of one embedding, where pictures have any size and positions
            three axes; None: pictures, or their squares, have one size.
        tiles: for models that may read a picture in tiles beside a small copy of it, which `before`
            and `after` are around; None: there is only the picture.
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
    tiles: TileTexts | None = None
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
