"""Where sequences begin and end in a batch, as Triton programs read it: all tokens in one row.

A batch `[B, T]` is B sequences of T tokens. A packed row `[1, T]` with `cu_seqlens` holds N of any
length, one after another. Nothing here waits for the device: a count that only the device knows is
replaced by its upper bound, and programs beyond the count find no work.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from edgekit.errors import UsageError

__all__ = ["Sequences", "sequence_offsets"]

Table = TypeVar("Table")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sequences:
    """The sequences of a batch.

    Attributes:
        offsets: the first token of each, and the end of the last: int32 `[N + 1]`.
        tokens: of all of them.
        time: of each; None: their lengths are known to the device alone.
    """

    offsets: torch.Tensor
    tokens: int
    time: int | None

    @classmethod
    def of(cls, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> "Sequences":
        """Those of `x [B, T, ...]`: what `sequence_offsets` says, or its rows.

        Raises:
            UsageError: as `sequence_offsets` does.
        """
        batch, time = x.shape[:2]
        if cu_seqlens is None:
            offsets = _remembered(_even_offsets, batch, time, device=x.device)
            return cls(offsets=offsets, tokens=batch * time, time=time)
        return cls(offsets=sequence_offsets(x, cu_seqlens), tokens=time, time=None)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1

    def chunks(self, length: int, *, before: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Which sequence each chunk belongs to; a sequence's last chunk may be shorter.

        Args:
            length: tokens of a chunk.
            before: places that every sequence has ahead of its tokens.

        Returns:
            The first chunk of each sequence and the end of the last, int32 `[N + 1]`; and the
            sequence of each chunk, int32 `[at least the number of chunks]`, N for those that do not
            exist.
        """
        if self.time is not None:
            sizes = (len(self), self.time + before, length)
            return _remembered(_even_chunks, *sizes, device=self.offsets.device)
        lengths = self.offsets.diff() + before
        most = (self.tokens + before * len(self)) // length + len(self)
        return _chunks(lengths, length, most)


def sequence_offsets(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The first token of each packed sequence, and the end of the last: int32 `[N + 1]`.

    Args:
        x: `[1, T, ...]`.
        cu_seqlens: integers `[N + 1]` from 0 to T, never falling, on `x`'s device. A GPU's are
            trusted, since a look would wait for it: what belongs to no sequence is undefined there.

    Raises:
        UsageError: if there are packed sequences in more than one row, no list of offsets, or such
            as do not lead from 0 to T.
    """
    batch, time = x.shape[:2]
    if batch != 1 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise UsageError(
            f"cu_seqlens {list(cu_seqlens.shape)} given for a batch of {batch}; allowed: a list of "
            "N + 1 offsets for a batch of 1"
        )
    offsets = cu_seqlens.to(torch.int32).contiguous()  # programs count from its first element
    if offsets.device.type == "cpu":
        _check(offsets.tolist(), time)
    return offsets


def _check(offsets: list[int], time: int) -> None:
    if offsets[0] != 0 or offsets[-1] != time or offsets != sorted(offsets):
        raise UsageError(
            f"cu_seqlens from {offsets[0]} to {offsets[-1]} given; allowed: offsets that lead from "
            f"0 to {time} and never fall"
        )


def _remembered(make: Callable[..., Table], *sizes: int, device: torch.device) -> Table:
    """What `make` returns for these sizes, made once for each stream.

    A model asks for the same tables in every layer and step, and each costs seven small programs.
    A graph that is being captured gets tables of its own: only its replay fills them.
    """
    cuda = device.type == "cuda"
    alone = cuda and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    table: Table = (_made.__wrapped__ if alone else _made)(make, sizes, device, stream)
    return table


@functools.lru_cache(maxsize=128)
def _made(
    make: Callable[..., Table], sizes: tuple[int, ...], device: torch.device, stream: int
) -> Table:
    del stream  # a part of the key: another one might read a table before it is written
    with torch.inference_mode(mode=False):  # autograd refuses to keep what was made in that mode
        table: Table = make(*sizes, device)
    return table


def _even_offsets(batch: int, time: int, device: torch.device) -> torch.Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * time


def _even_chunks(
    batch: int, time: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.full((batch,), time, dtype=torch.int32, device=device)
    return _chunks(lengths, length, batch * -(-time // length))


def _chunks(lengths: torch.Tensor, length: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    first = lengths.new_zeros(len(lengths) + 1)
    first[1:] = ((lengths + length - 1) // length).cumsum(0)
    every = torch.arange(most, dtype=torch.int32, device=lengths.device)
    owner = torch.searchsorted(first[1:].contiguous(), every, right=True, out_int32=True)
    return first, owner
