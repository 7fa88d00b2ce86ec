"""A session's state outside its session: kept in memory, or in one safetensors file.

The file's metadata name the bundle (its fingerprint) and the engine, because a state means nothing
to another graph. Copies are bit exact.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgekit.bundle import Manifest, StateRecord
from edgekit.errors import BundleError, UsageError
from edgekit.runtime.engine import Array, Integers, state_key

__all__ = ["Snapshot", "load_snapshot", "save_snapshot", "state_bytes", "state_shape"]

FORMAT = "edgekit-state-1"
STATE = "state."


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The state of a session at one position; pass it back to `Session.restore`.

    Attributes:
        fingerprint: of the bundle that it belongs to.
        engine: `openvino` or `onnx`.
        position: columns appended so far, padding included.
        tokens: of those, tokens of each row `[B]`.
        mask: 1 for tokens, 0 for padding `[B, S]`; None where every state is constant in size.
        states: by key; empty at position 0.
        behind: how far positions are behind the count of tokens because of pictures, 0 or less,
            `[B]`.
    """

    fingerprint: str
    engine: str
    position: int
    tokens: Integers
    mask: Integers | None
    states: Mapping[str, Array]
    behind: Integers

    @property
    def batch(self) -> int:
        """B: rows."""
        return len(self.tokens)


def state_bytes(manifest: Manifest, engine: str, position: int, *, batch: int = 1) -> int:
    """Bytes of every state of `batch` rows after `position` columns."""
    return sum(
        math.prod(state_shape(record, engine, batch, position)) * np.dtype(record.dtype).itemsize
        for record in manifest.states
    )


def state_shape(record: StateRecord, engine: str, batch: int, position: int) -> tuple[int, ...]:
    """The shape of a state for `batch` rows at `position`; the record has -1 for these two."""
    return (batch, *(position if size < 0 else size for size in record.shape_on(engine)[1:]))


def save_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write one safetensors file.

    Raises:
        UsageError: if `path` cannot be written.
    """
    tensors = {STATE + key: np.ascontiguousarray(value) for key, value in snapshot.states.items()}
    tensors["tokens"], tensors["behind"] = snapshot.tokens, snapshot.behind
    if snapshot.mask is not None:
        tensors["mask"] = np.ascontiguousarray(snapshot.mask)
    metadata = {
        "format": FORMAT,
        "fingerprint": snapshot.fingerprint,
        "engine": snapshot.engine,
        "position": str(snapshot.position),
    }
    try:
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as cause:
        raise UsageError(f"{path}: cannot be written ({cause})") from cause


def load_snapshot(path: Path, manifest: Manifest, engine: str) -> Snapshot:
    """Read what `save_snapshot` wrote and check that it fits.

    Raises:
        BundleError: if the file is missing, damaged, or belongs to another bundle or engine.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as cause:
        raise BundleError(f"{path}: not a saved state, or damaged ({cause})") from cause
    if metadata.get("format") != FORMAT:
        raise BundleError(f"{path}: not a saved state of this edgekit ({FORMAT})")
    states = {n.removeprefix(STATE): t for n, t in tensors.items() if n.startswith(STATE)}
    if "tokens" not in tensors or not metadata.get("position", "").isdigit():
        raise BundleError(f"{path}: damaged (no position); save the session again")
    snapshot = Snapshot(
        fingerprint=metadata.get("fingerprint", ""),
        engine=metadata.get("engine", ""),
        position=int(metadata["position"]),
        tokens=tensors["tokens"],
        mask=tensors.get("mask"),
        states=states,
        # States that were saved before pictures had positions of their own have none behind.
        behind=tensors.get("behind", np.zeros_like(tensors["tokens"])),
    )
    check_snapshot(snapshot, manifest, engine, where=str(path))
    return snapshot


def check_snapshot(snapshot: Snapshot, manifest: Manifest, engine: str, *, where: str) -> None:
    """Refuse a state that another graph made, or whose tensors are not those of this one.

    Raises:
        BundleError: saying what differs.
    """
    if snapshot.fingerprint != manifest.fingerprint:
        raise BundleError(f"{where}: the state belongs to another bundle; use it with that one")
    if snapshot.engine != engine:
        raise BundleError(f"{where}: the state was made on {snapshot.engine}, this is {engine}")
    for name in ("tokens", "behind"):
        value = getattr(snapshot, name)
        _check_tensor(where, name, value, np.dtype(np.int64), (snapshot.batch,))
    if (snapshot.mask is None) != manifest.constant_memory:
        raise BundleError(f"{where}: damaged (its attention mask); save the session again")
    if snapshot.mask is not None:
        rows = (snapshot.batch, snapshot.position)
        _check_tensor(where, "mask", snapshot.mask, np.dtype(np.int64), rows)
    records = manifest.states if snapshot.position else ()
    if {state_key(record) for record in records} != set(snapshot.states):
        raise BundleError(f"{where}: its states are not those of this bundle")
    for record in records:
        shape = state_shape(record, engine, snapshot.batch, snapshot.position)
        key = state_key(record)
        _check_tensor(where, key, snapshot.states[key], np.dtype(record.dtype), shape)


def _check_tensor(
    where: str, name: str, tensor: Array, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise BundleError(
            f"{where}: {name} is {tensor.dtype} {tensor.shape}, expected {dtype} {shape}"
        )
