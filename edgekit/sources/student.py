"""A distilled student on disk: only what differs from its teacher, and where it came from.

A directory of

    student.json          `StudentManifest`
    student.safetensors   fp16 or fp32: what the mixers add, under full names
                          (`model.layers.3.self_attn.conv_q.weight`), and differences B A to the
                          teacher's matrices (`...q_proj.lowrank_a` [r, in], `.lowrank_b` [out, r])
    README.md, metrics.jsonl, loss.png: for people; optional
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from edgekit import config, students
from edgekit.artefacts.lowrank import LowRank
from edgekit.bundle import FileRecord
from edgekit.errors import SourceError, UsageError
from edgekit.mixers.base import mixer_type
from edgekit.models.config import DecoderConfig, LawcatConfig, LolcatsConfig
from edgekit.models.weights import WeightStore
from edgekit.sources.base import Source, read_json, sha256_of
from edgekit.sources.builtin import BUILT_IN
from edgekit.sources.hf import SafetensorsStore
from edgekit.sources.resolve import open_source
from edgekit.sources.student_weights import A, B, StudentStore, check_tensors, lowrank
from edgekit.staging import MARKERS

__all__ = [
    "FORMAT_VERSION",
    "StageRecord",
    "Student",
    "StudentManifest",
    "ancestor",
    "apply_student",
    "find_student",
    "lowrank_pairs",
    "lowrank_tensors",
    "open_model",
    "read_student",
    "write_student",
]

FORMAT_VERSION = 1
MANIFEST, TENSORS = MARKERS["student"], "student.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """One stage of a training that ended.

    Attributes:
        stage: 1 for attention transfer, 2 for tuning of the whole model, and so on.
        steps: optimiser steps.
        tokens: tokens read, padding not counted.
        seconds: wall time, all bursts together.
        loss: the last one; None if no step was made.
        device: in words, such as "NVIDIA H100" or "cpu, 2 threads".
    """

    stage: int
    steps: int
    tokens: int
    seconds: float
    loss: float | None
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentManifest:
    """The contents of `student.json`.

    Attributes:
        base: `Source.identity` of the teacher; its sha256 decides what the student fits.
        mixers: token mixer of each layer; `softmax` where the teacher's was kept.
        lawcat: options of the `lawcat` layers.
        lolcats: options of the `lolcats` layers; None where there are none.
        recipe: every setting of the training, and its `name`.
        data: one record per training file: name, sha256, tokens, and licence where it is known.
        lineage: what `ancestor` says of each student that this one goes on from, the first first.
        training: one record per stage, in order; those of the student it began from come first.
        metrics: figures measured after training.
        versions: of the packages that trained it.
        files: size and sha256 of `student.safetensors`; filled in by `write_student`.
    """

    format_version: int = FORMAT_VERSION
    name: str
    base: dict[str, Any]
    mixers: tuple[str, ...]
    lawcat: LawcatConfig = field(default_factory=LawcatConfig)
    lolcats: LolcatsConfig | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    data: tuple[dict[str, Any], ...] = ()
    lineage: tuple[dict[str, Any], ...] = ()
    training: tuple[StageRecord, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what decides whether the student fits a model."""
        for key in ("name", "kind", "sha256"):
            if not isinstance(self.base.get(key), str):
                raise UsageError(f"student {self.name!r}: its base has no {key}")
        for mixer in dict.fromkeys(self.mixers):
            mixer_type(mixer)
        if ("lolcats" in self.mixers) != (self.lolcats is not None):
            raise UsageError(f"student {self.name!r}: lolcats layers and their options go together")


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """An opened student; its tensors are memory-mapped."""

    manifest: StudentManifest
    directory: Path
    tensors: WeightStore

    @property
    def sha256(self) -> str:
        """Of its tensors' file."""
        return self.manifest.files[TENSORS].sha256


def ancestor(manifest: StudentManifest) -> dict[str, Any]:
    """What a student's descendants keep of how it was made: name, tensors, recipe and data."""
    return {
        "name": manifest.name,
        "sha256": manifest.files[TENSORS].sha256,
        "recipe": manifest.recipe,
        "data": list(manifest.data),
    }


def write_student(
    work: Path,
    manifest: StudentManifest,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: Literal["float16", "float32"] = "float16",
) -> StudentManifest:
    """Write `student.safetensors` and `student.json` into an existing directory.

    Args:
        work: usually what `staged(out, kind="student")` gives, so that all or nothing stays.
        manifest: `files` in it is replaced.
        tensors: by the names that the module's docstring shows; any float dtype, any device.
        dtype: how they are stored.

    Returns:
        The manifest as it was written.

    Raises:
        UsageError: if a tensor is not finite, or is too large for fp16.

    Example:
        >>> with staged(out, kind="student") as work:              # doctest: +SKIP
        ...     write_student(work, manifest, tensors)
    """
    from safetensors.torch import save_file

    stored = {name: _narrowed(name, tensor, dtype) for name, tensor in tensors.items()}
    save_file(stored, work / TENSORS, metadata={"format": "pt"})
    written = replace(manifest, files={TENSORS: _record(work / TENSORS)})
    text = json.dumps(config.dump(written), indent=1, ensure_ascii=False)
    (work / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return written


def _narrowed(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    narrow = tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
    if not narrow.isfinite().all():
        reason = f"is too large for {dtype}" if tensor.isfinite().all() else "is not finite"
        raise UsageError(f"student tensor {name!r}: a value {reason}; it is not written")
    return narrow


def _record(path: Path) -> FileRecord:
    return FileRecord(size=path.stat().st_size, sha256=sha256_of([path]))


def find_student(spec: str | Path) -> Path | None:
    """The directory that `spec` means: a student on disk comes first, then one that ships.

    Returns:
        None if it is neither.
    """
    path = Path(spec).expanduser()
    if (path / MANIFEST).is_file() and str(spec):  # Path("") is the current directory
        return path
    return students.student_path(str(spec).lower())


def read_student(spec: str | Path) -> Student:
    """Open a student and check it against its manifest.

    Args:
        spec: a student directory, or the name of a student that ships with edgekit.

    Raises:
        SourceError: if it is missing, foreign, damaged, or of another format version.
    """
    directory = find_student(spec)
    if directory is None:
        known = ", ".join(students.student_names()) or "none here"
        there = str(spec) and Path(spec).expanduser().exists()
        found = f"not an edgekit student ({MANIFEST} is missing)" if there else "no such student"
        raise SourceError(
            f"{spec}: {found}; allowed: a directory that `edgekit distill` wrote, "
            f"or the name of one that ships with edgekit ({known})"
        )
    path = directory / MANIFEST
    data = read_json(path)
    if data.get("format_version") != FORMAT_VERSION:
        raise SourceError(
            f"{path}: student format {data.get('format_version')!r}, this edgekit reads "
            f"{FORMAT_VERSION}; distil again, or use the edgekit that wrote it"
        )
    try:
        manifest = config.load(StudentManifest, data, where=str(path), error=SourceError)
    except UsageError as cause:
        raise SourceError(f"{path}: {cause}") from cause
    _check_file(directory / TENSORS, manifest.files.get(TENSORS))
    tensors = SafetensorsStore({directory / TENSORS: None})
    return Student(manifest=manifest, directory=directory, tensors=tensors)


def _check_file(path: Path, record: FileRecord | None) -> None:
    if not path.is_file():
        raise SourceError(f"{path}: missing; distil again, or fetch the student again")
    if record != _record(path):
        raise SourceError(
            f"{path}: damaged (size or sha256 differs from {MANIFEST}); fetch the student again"
        )


def apply_student(source: Source, student: Student) -> tuple[DecoderConfig, WeightStore]:
    """Put a student into its teacher.

    Args:
        source: the teacher; its tensors stay as they are.
        student: made from the same teacher.

    Returns:
        The student's configuration, and a store that folds each difference in fp32 when its tensor
        is read.

    Raises:
        SourceError: if the student was made from another model, or a tensor is missing, left over,
            of another shape, or not finite.
    """
    manifest, layers = student.manifest, source.config.num_layers
    base = manifest.base
    if base["sha256"] != source.identity["sha256"]:
        raise SourceError(
            f"student {manifest.name!r} was made from {base['name']} (sha256 "
            f"{base['sha256'][:12]}), not from {source.name} (sha256 "
            f"{source.identity['sha256'][:12]}); give the model that it was made from"
        )
    if len(manifest.mixers) != layers:
        raise SourceError(
            f"student {manifest.name!r} has {len(manifest.mixers)} mixers, {source.name} has "
            f"{layers} layers; fetch the student again"
        )
    options = source.config.with_mixers(manifest.mixers, manifest.lawcat, manifest.lolcats)
    check_tensors(student.tensors, options, source.weights, where=student.directory / TENSORS)
    return options, StudentStore(student.tensors, source.weights)


def lowrank_pairs(student: Student) -> dict[str, LowRank]:
    """The student's differences by the matrix they add to (`model.layers.3.self_attn.q_proj`)."""
    stems = (name.removesuffix(A) for name in student.tensors if name.endswith(A))
    return {stem: lowrank(student.tensors, stem) for stem in stems}


def lowrank_tensors(pairs: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    """The tensors that `write_student` stores differences as; undoes `lowrank_pairs`."""
    stored = {stem + A: pair.a for stem, pair in pairs.items()}
    return stored | {stem + B: pair.b for stem, pair in pairs.items()}


def open_model(
    spec: str | Path, *, base: str | Path | None = None
) -> tuple[Source, DecoderConfig, WeightStore]:
    """Open a teacher, or a student over its teacher, for use in PyTorch.

    Args:
        spec: a model source as for `open_source`, or a student directory or name.
        base: the student's teacher, where its manifest does not say where to find it.

    Returns:
        The teacher as a source (tokenizer and all), and the configuration and tensors of what
        `spec` names.

    Raises:
        SourceError: if something is missing or damaged, or the student is of another base.
        UsageError: if `base` is given for what is no student, or not given where it is needed.
    """
    if not _is_student(spec):
        if base is not None:
            raise UsageError(f"base {base} given for {spec}; allowed: with a student only")
        source = open_source(spec)
        return source, source.config, source.weights
    student = read_student(spec)
    source = open_source(base) if base is not None else _open_base(student.manifest)
    return source, *apply_student(source, student)


def _is_student(spec: str | Path) -> bool:
    """Unlike for `read_student`, any model on disk hides a student that ships under its name."""
    path = Path(spec).expanduser()
    return (path / MANIFEST).is_file() if path.exists() else find_student(spec) is not None


def _open_base(manifest: StudentManifest) -> Source:
    base = manifest.base
    if base["kind"] == "hub":
        return open_source(base["name"], revision=base.get("revision"))
    for key, model in BUILT_IN.items():
        if base["kind"] == "built-in" and base["name"] == model.name:
            return open_source(key)
    raise UsageError(
        f"student {manifest.name!r} was made from {base['name']} ({base['kind']}), which cannot be "
        "found by its name; give the model with --base"
    )
