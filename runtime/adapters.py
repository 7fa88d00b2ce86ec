"""Adapters of a loaded bundle: checked against its slots, kept by name, summed by weight."""

import math
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import AdapterError, UsageError
from edgekit.runtime.adapter_file import AdapterFile, read_adapter
from edgekit.runtime.lowrank import Pair, joined, low_rank_pairs
from edgekit.runtime.vector_pack import apply_pack, read_pack

__all__ = ["AdapterInfo", "Adapters", "matched_pairs"]

Slots = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """A loaded adapter.

    Attributes:
        matched: modules of it that have a slot, and so have an effect.
        modules: all that it adapts.
        rank: the largest of a module.
        bytes: of the pairs that are kept.
        directory: where it, or what a vector pack stands over, was read.
    """

    matched: int
    modules: int
    rank: int
    bytes: int
    directory: Path


@dataclass(frozen=True, slots=True)
class _Loaded:
    info: AdapterInfo
    pairs: Mapping[str, Pair]


class Adapters:
    """The adapters that one model has loaded; safe to use from several threads."""

    def __init__(self, slots: Slots) -> None:
        """Take adapters for `slots`, `(out, in)` by module."""
        self._slots = slots
        self._loaded: dict[str, _Loaded] = {}
        self._lock = threading.Lock()

    @property
    def infos(self) -> dict[str, AdapterInfo]:
        """What is loaded, by name."""
        with self._lock:
            return {name: loaded.info for name, loaded in self._loaded.items()}

    def load(self, path: Path, name: str | None, over: str | Path | None) -> str:
        """Read and check an adapter, or a vector pack over one.

        Returns:
            Its name: `name`, or that of the directory or file.

        Raises:
            AdapterError: if it cannot be read, does not fit, or no module of it has a slot.
            UsageError: if the name is taken.
        """
        _check_slots(self._slots)
        if over is None and path.is_file():
            raise AdapterError(
                f"{path}: a file given; allowed: a directory that PEFT saved, or a vector pack "
                "together with the adapter that it is over"
            )
        chosen = name or (path.stem if over is not None else path.resolve().name)
        self._check_free(chosen)
        file = read_adapter(path) if over is None else self._packed(path, over)
        pairs, count = matched_pairs(file, self._slots)
        info = AdapterInfo(
            matched=len(pairs),
            modules=count,
            rank=max(pair.rank for pair in pairs.values()),
            bytes=sum(pair.a.nbytes + pair.b.nbytes for pair in pairs.values()),
            directory=file.directory,
        )
        with self._lock:
            self._check_free(chosen)
            self._loaded[chosen] = _Loaded(info, pairs)
        return chosen

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UsageError: if there is none of this name.
        """
        with self._lock:
            self._known(name)
            del self._loaded[name]

    def combined(self, weights: Mapping[str, float]) -> dict[str, Pair]:
        """The weighted sum of adapters, exact: ranks side by side; weight 0 leaves one out.

        Raises:
            UsageError: for an adapter that is not loaded, or a weight that is not finite.
        """
        with self._lock:
            chosen = [(_checked(n, w), self._known(n).pairs) for n, w in weights.items()]
        parts: dict[str, list[tuple[float, Pair]]] = {}
        for weight, pairs in chosen:
            for module, pair in pairs.items() if weight else ():
                parts.setdefault(module, []).append((weight, pair))
        return {module: joined(found) for module, found in parts.items()}

    def _known(self, name: str) -> _Loaded:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise UsageError(f"adapter {name!r} given; loaded are: {known}")
        return self._loaded[name]

    def _check_free(self, name: str) -> None:
        if name in self._loaded:
            raise UsageError(
                f"adapter {name!r} is loaded already; give another name, or unload_adapter it first"
            )

    def _packed(self, path: Path, over: str | Path) -> AdapterFile:
        with self._lock:
            loaded = self._loaded.get(str(over))
        directory = Path(over) if loaded is None else loaded.info.directory
        return apply_pack(read_pack(path), read_adapter(directory))


def matched_pairs(file: AdapterFile, slots: Slots) -> tuple[dict[str, Pair], int]:
    """The pairs of an adapter that have a slot, and how many modules it adapts.

    Warns:
        UserWarning: if some have none.

    Raises:
        AdapterError: if none has one, or one is of another shape.
    """
    _check_slots(slots)
    pairs = low_rank_pairs(file)
    matched = {module: pair for module, pair in pairs.items() if module in slots}
    rest = [module for module in pairs if module not in slots]
    count = f"{len(matched)} of {len(pairs)} modules have an adapter slot in this bundle"
    if not matched:
        raise AdapterError(
            f"{file.directory}: {count} (the first without: {rest[0]}; the first slot: "
            f"{next(iter(slots))}); give an adapter of this model, or convert it with "
            "--adapter-slots all"
        )
    for module, pair in matched.items():
        if pair.shape != slots[module]:
            raise AdapterError(
                f"{file.directory}: {module} of this bundle is {list(slots[module])}, the "
                f"adapter's is {list(pair.shape)}; give an adapter of this model"
            )
    if rest:
        warnings.warn(
            f"{file.directory}: {count}; {rest[0]} has none, so its part has no effect: convert "
            "with --adapter-slots all",
            stacklevel=2,
        )
    return matched, len(pairs)


def _check_slots(slots: Slots) -> None:
    if not slots:
        raise AdapterError(
            "this bundle has no adapter slots; convert the model again with --adapter-slots all"
        )


def _checked(name: str, weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UsageError(f"weight {weight!r} given for adapter {name!r}; allowed: a finite number")
    return float(weight)
