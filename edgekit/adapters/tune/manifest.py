"""`tune.json`: how an adapter was made, and what training it took."""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from edgekit import __version__, config
from edgekit.bundle import FileRecord, describe_files
from edgekit.errors import SourceError
from edgekit.models.precision import Precision
from edgekit.sources.base import read_json

__all__ = [
    "MANIFEST",
    "Memory",
    "Trainable",
    "Trial",
    "TuneManifest",
    "describe_device",
    "memory_of",
    "package_versions",
    "read_tune",
    "seconds_per_step",
    "trainable_of",
    "write_tune",
]

FORMAT_VERSION = 1
MANIFEST = "tune.json"
PACKAGES = ("torch", "peft", "accelerate", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainable:
    """Elements that are trained: in the first step, in the last, and over all of them."""

    start: int
    end: int
    mean: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that training needs beside the model and its activations.

    Attributes:
        peak: of gradients, the optimiser's state and the scores of freezing, together.
        end: of the same, in the last step.
        mean: of the same, over all steps.
        optimizer: state at the peak.
        gradients: at the peak.
        scores: at the peak.
    """

    peak: int
    end: int
    mean: float
    optimizer: int
    gradients: int
    scores: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One rate of a search: the held-out loss after its steps."""

    lr: float
    steps: int
    held_out_loss: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneManifest:
    """The contents of `tune.json`.

    Attributes:
        name: of the adapter.
        method: `aflora`, `lora` or `vera`.
        order: what was done to the base, in this order: `distil` if it is a student, then `tune`.
        base: `Source.identity` of the model, or of the student's teacher.
        student: name, sha256, mixers, recipe and data of the student; None: there is none.
        recipe: every setting of the training, the rate that was found among them.
        data: one record per file: name, sha256, rows, dropped, times.
        held_out: the same of what it was measured on.
        seeds: by purpose.
        steps: optimiser steps.
        rows: examples read, repeats counted.
        trainable: elements.
        memory: bytes.
        seconds_per_step: the median.
        seconds: of all steps.
        device: in words.
        search: what each rate that was tried gave, in the order given.
        metrics: the last loss; held-out loss without and with the adapter, in nats by token.
        freezes: what froze: step, module, part, score.
        versions: of the packages that trained it.
        files: size and sha256 of every other file.
    """

    format_version: int = FORMAT_VERSION
    name: str
    method: str
    order: tuple[str, ...]
    base: dict[str, Any]
    student: dict[str, Any] | None = None
    recipe: dict[str, Any]
    data: tuple[dict[str, Any], ...]
    held_out: tuple[dict[str, Any], ...] = ()
    seeds: dict[str, int] = field(default_factory=dict)
    steps: int
    rows: int
    trainable: Trainable
    memory: Memory
    seconds_per_step: float
    seconds: float
    device: str
    search: tuple[Trial, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    freezes: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)


def write_tune(directory: Path, manifest: TuneManifest) -> TuneManifest:
    """Write `tune.json` into a directory whose other files are all there; returns it as written."""
    found = {name: file for name, file in describe_files(directory).items() if name != MANIFEST}
    written = replace(manifest, files=found)
    text = json.dumps(config.dump(written), indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return written


def read_tune(directory: Path | str) -> TuneManifest:
    """Read `tune.json`.

    Raises:
        SourceError: if it is missing, damaged, or of another format version.
    """
    path = Path(directory) / MANIFEST
    data = read_json(path)
    if data.get("format_version") != FORMAT_VERSION:
        raise SourceError(
            f"{path}: format {data.get('format_version')!r}, this edgekit reads {FORMAT_VERSION}; "
            "tune again, or use the edgekit that wrote it"
        )
    return config.load(TuneManifest, data, where=str(path), error=SourceError)


def trainable_of(records: Sequence[dict[str, Any]]) -> Trainable:
    """Start, end and mean from the records of all steps."""
    counts = [record["trainable"] for record in records]
    return Trainable(start=counts[0], end=counts[-1], mean=statistics.fmean(counts))


def memory_of(records: Sequence[dict[str, Any]]) -> Memory:
    """Peak, end and mean from the records of all steps."""
    totals = [r["optimizer_bytes"] + r["gradient_bytes"] + r["score_bytes"] for r in records]
    highest = records[totals.index(max(totals))]
    return Memory(
        peak=max(totals),
        end=totals[-1],
        mean=statistics.fmean(totals),
        optimizer=highest["optimizer_bytes"],
        gradients=highest["gradient_bytes"],
        scores=highest["score_bytes"],
    )


def seconds_per_step(records: Sequence[dict[str, Any]]) -> float:
    """The median, which neither the first step nor a busy moment moves."""
    return round(float(statistics.median(r["step_seconds"] for r in records)), 4)


def describe_device(device: torch.device, precision: Precision) -> str:
    """Device and precision, for records."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}"
    return f"CPU, {torch.get_num_threads()} threads, {precision}"


def package_versions() -> dict[str, str]:
    """Of what trains."""
    found = {"edgekit": __version__, "python": platform.python_version()}
    return found | {package: metadata.version(package) for package in PACKAGES}
