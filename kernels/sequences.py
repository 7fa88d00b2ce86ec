"""Where sequences begin and end in a batch, as Triton programs read it: all tokens in one row.

A batch `[B, T]` is B sequences of T tokens. A packed row `[1, T]` with `cu_seqlens` holds N of any
length, one after another. Nothing here waits for the device: a count that only the device knows is
replaced by its upper bound, and programs beyond the count find no work.
"""

import torch

from edgekit.errors import UsageError

__all__ = ["chunk_table", "sequence_offsets"]


def sequence_offsets(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The first token of each sequence, and the end of the last: int32 `[N + 1]`.

    Args:
        x: `[B, T, ...]`.
        cu_seqlens: integers `[N + 1]` from 0 to T, rising, on `x`'s device; B must then be 1.
            None: every row is a sequence.

    Raises:
        UsageError: if there are packed sequences in more than one row, or no list of offsets.
    """
    batch, time = x.shape[:2]
    if cu_seqlens is None:
        return torch.arange(batch + 1, dtype=torch.int32, device=x.device) * time
    if batch != 1 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise UsageError(
            f"cu_seqlens {list(cu_seqlens.shape)} given for a batch of {batch}; allowed: a list of "
            "N + 1 offsets for a batch of 1"
        )
    return cu_seqlens.to(torch.int32).contiguous()  # programs count from its first element


def chunk_table(
    offsets: torch.Tensor, tokens: int, chunk: int, *, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sequence each chunk belongs to; a sequence's last chunk may be shorter.

    Args:
        offsets: what `sequence_offsets` returned, `[N + 1]`.
        tokens: of all sequences.
        chunk: tokens of a chunk.
        packed: whether lengths are known to the device alone.

    Returns:
        The first chunk of each sequence and the end of the last, int32 `[N + 1]`; and the sequence
        of each chunk, int32 `[at least the number of chunks]`, N for those that do not exist.
    """
    count = len(offsets) - 1
    lengths = offsets.diff()
    first = torch.zeros_like(offsets)
    first[1:] = ((lengths + chunk - 1) // chunk).cumsum(0)
    most = tokens // chunk + count if packed else count * -(-tokens // (max(count, 1) * chunk))
    every = torch.arange(most, dtype=torch.int32, device=offsets.device)
    owner = torch.searchsorted(first[1:].contiguous(), every, right=True, out_int32=True)
    return first, owner
