"""Where a decoder's tensors come from: a read-only mapping from checkpoint names to arrays.

Names are those of a Hugging Face Llama checkpoint (`model.layers.3.self_attn.q_proj.weight`),
whatever the source was, so that the torch decoder and both exporters read the same store.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from edgekit.errors import SourceError

__all__ = ["MemoryStore", "OverlayStore", "WeightStore"]


class WeightStore(Protocol):
    """Read-only tensors by name, loaded one at a time."""

    def __contains__(self, name: str) -> bool:
        """Whether the store holds `name`."""
        ...

    def __iter__(self) -> Iterator[str]:
        """Every name held."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored (any float dtype); memory-mapped where the source allows it.

        Raises:
            SourceError: if the store does not hold it.
        """
        ...


class MemoryStore:
    """A store over tensors that are already in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`."""
        if name not in self._tensors:
            raise SourceError(f"the source has no tensor {name!r}; is the checkpoint complete?")
        return self._tensors[name]


class OverlayStore:
    """`upper` where it holds a name, `base` elsewhere: a student over its teacher."""

    def __init__(self, upper: WeightStore, base: WeightStore) -> None:
        self._upper, self._base = upper, base

    def __contains__(self, name: str) -> bool:
        return name in self._upper or name in self._base

    def __iter__(self) -> Iterator[str]:
        yield from self._upper
        yield from (name for name in self._base if name not in self._upper)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, from the upper store first."""
        store = self._upper if name in self._upper else self._base
        return store.tensor(name)
