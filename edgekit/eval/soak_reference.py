"""What a soaked fp32 bundle is compared with: its student in PyTorch, in fp64, in chunks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edgekit.bundle import Manifest
from edgekit.errors import BundleError, UsageError
from edgekit.eval.reader import Floats, Integers
from edgekit.eval.torch_reading import load_decoder
from edgekit.mixers.base import State
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder
from edgekit.models.weights import WeightStore
from edgekit.sources.base import Source
from edgekit.sources.student import open_model

__all__ = ["TorchReference", "check_origin", "open_reference"]

CHUNK = 512  # tokens of one call of the decoder
CHANGES = ("adapters", "spin")  # steps of a conversion that no student has


class TorchReference:
    """One row of text in a decoder of fp64, its state carried from chunk to chunk."""

    def __init__(self, decoder: Decoder) -> None:
        """Start at position 0 in `decoder`, which becomes fp64."""
        self._decoder = decoder.double()
        self._state: list[State] | None = None

    @torch.inference_mode()
    def append(self, ids: Integers) -> Floats:
        """Read `ids [T]`; returns the logits of the last position, `[1, V]`."""
        hidden = torch.empty(0)
        for chunk in torch.split(torch.from_numpy(ids)[None], CHUNK, dim=1):
            hidden, self._state = self._decoder.hidden(chunk, state=self._state)
        logits: Floats = self._decoder.lm_head(hidden[:, -1]).float().numpy()
        return logits

    def save(self, path: Path) -> None:
        """Write the state to one safetensors file."""
        layers = enumerate(self._state or [])
        save_file({f"{i}.{n}": t.contiguous() for i, s in layers for n, t in s.items()}, path)

    def load(self, path: Path) -> None:
        """Go on from a saved state.

        Raises:
            BundleError: if the file is missing or damaged.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as cause:
            raise BundleError(f"{path}: not a saved state, or damaged ({cause})") from cause
        self._state = [{} for _ in self._decoder.layers]
        for name, tensor in tensors.items():
            layer, _, part = name.partition(".")
            self._state[int(layer)][part] = tensor


def open_reference(
    source: str | None, student: str | None, *, threads: int | None
) -> TorchReference:
    """Open what a bundle was made from, as `check_origin` found it.

    Args:
        source: the teacher, or what the bundle was made from as it is; None: where the student says
            that its teacher is.
        student: put into it; None: none.
        threads: of PyTorch; None: as they are.

    Raises:
        SourceError: if something is missing or damaged.
    """
    _, config, weights = _opened(source, student)
    decoder, _ = load_decoder(config, weights, device="cpu", threads=threads)
    return TorchReference(decoder)


def check_origin(manifest: Manifest, source: str | None, student: str | None) -> None:
    """Refuse to compare a bundle with something else than it was made from.

    Args:
        manifest: the bundle's.
        source: as for `open_reference`.
        student: as for `open_reference`.

    Raises:
        SourceError: if something is missing or damaged.
        UsageError: saying what differs.
    """
    changes = [step["step"] for step in manifest.pipeline if step["step"] in CHANGES]
    if changes:
        raise UsageError(
            f"this bundle was made with {' and '.join(changes)}, which the source lacks; "
            "leave --source and --student out"
        )
    opened, config, _ = _opened(source, student)
    if manifest.source.get("sha256") != opened.identity.get("sha256"):
        raise UsageError(
            f"{opened.name} given, but this bundle was made from {manifest.source.get('name')}; "
            "give that"
        )
    if manifest.mixers != config.mixers:
        raise UsageError(
            f"{_layers(config.mixers)} given, but this bundle has {_layers(manifest.mixers)}; "
            "give the student that it was made with as --student"
        )


def _opened(source: str | None, student: str | None) -> tuple[Source, DecoderConfig, WeightStore]:
    return open_model(student or source or "", base=source if student else None)


def _layers(mixers: tuple[Any, ...]) -> str:
    names, counts = np.unique(mixers, return_counts=True)
    return " and ".join(f"{count} {name} layers" for name, count in zip(names, counts, strict=True))
