"""A student's tensors over its teacher's: checked, and folded when they are read."""

from collections.abc import Iterator
from pathlib import Path

import torch

from edgekit.artefacts.lowrank import LowRank
from edgekit.errors import SourceError, UsageError
from edgekit.mixers.base import mixer_type
from edgekit.models.config import DecoderConfig
from edgekit.models.weights import WeightStore

__all__ = ["A", "B", "StudentStore", "check_tensors", "lowrank"]

A, B = ".lowrank_a", ".lowrank_b"  # endings of the two halves of a difference


def check_tensors(
    tensors: WeightStore, options: DecoderConfig, base: WeightStore, *, where: Path
) -> None:
    """Check that all the mixers add is there in its shape, and that whatever else is there fits.

    Args:
        tensors: the student's.
        options: the student's, with its mixers.
        base: the teacher's tensors.
        where: the file, named in errors.

    Raises:
        SourceError: if a tensor is missing, left over, of another shape, or not finite.
    """
    added = {
        f"model.layers.{layer}.self_attn.{name}": tuple(fresh.shape)
        for layer, mixer in enumerate(options.mixers)
        for name, fresh in mixer_type(mixer).fresh_tensors(options, layer).items()
    }
    for name, shape in added.items():
        if name not in tensors:
            raise SourceError(f"{where}: has no tensor {name!r}; fetch the student again")
        found = tensors.tensor(name)
        if tuple(found.shape) != shape:
            raise SourceError(
                f"{where}: {name!r} is {list(found.shape)}, the model asks for {list(shape)}"
            )
        if not found.isfinite().all():
            raise SourceError(f"{where}: {name!r} has values that are not finite")
    for name in tensors:
        if name not in added:
            _check_lowrank(where, name, tensors, base)


def _check_lowrank(where: Path, name: str, tensors: WeightStore, base: WeightStore) -> None:
    stem = name.removesuffix(A).removesuffix(B)
    target = f"{stem}.weight"
    if stem == name or target not in base:
        raise SourceError(f"{where}: {name!r} has no place in the model")
    if stem + A not in tensors or stem + B not in tensors:
        raise SourceError(f"{where}: {name!r} lacks its other half; fetch the student again")
    try:
        shape = lowrank(tensors, stem).shape
    except UsageError as cause:
        raise SourceError(f"{where}: {stem!r}: {cause}") from cause
    if shape != tuple(base.tensor(target).shape):
        raise SourceError(
            f"{where}: {name!r} is for a weight {list(shape)}, "
            f"the model's is {list(base.tensor(target).shape)}"
        )


def lowrank(tensors: WeightStore, stem: str) -> LowRank:
    """The difference to the matrix `stem` (`model.layers.3.self_attn.q_proj`)."""
    return LowRank(a=tensors.tensor(stem + A), b=tensors.tensor(stem + B))


class StudentStore:
    """The base's tensors with differences folded in, and the mixers' own; both in fp32."""

    def __init__(self, student: WeightStore, base: WeightStore) -> None:
        self._student, self._base = student, base

    def __contains__(self, name: str) -> bool:
        return name in self._base or (name in self._student and not name.endswith((A, B)))

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._student if not name.endswith((A, B)))
        yield from self._base

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`."""
        if name in self._student:
            return self._student.tensor(name).float()
        stem = name.removesuffix(".weight")
        if stem + A in self._student:
            return lowrank(self._student, stem).fold(self._base.tensor(name))
        return self._base.tensor(name)
