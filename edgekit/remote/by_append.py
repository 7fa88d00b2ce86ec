"""The rest of files sent to `there.py`, which needs nothing but Python on the other side."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from edgekit.remote.device import Device

__all__ = ["send_by_append"]

BLOCK = 1 << 18


def send_by_append(
    device: Device,
    source: Path,
    sizes: Mapping[str, int],
    kept: Mapping[str, int],
    partial: str,
    tell: Callable[[float], object],
) -> None:
    """Append what is missing of files; what is there of them must be their beginning.

    Args:
        device: where to.
        source: the directory here.
        sizes: bytes of each file, by its name relative to `source`.
        kept: how many of these are there.
        partial: the directory there.
        tell: called with how much of the whole is there, 0 to 1.

    Raises:
        EngineError: if the copy fails.
    """
    device.send("receive", partial, data=_told(_stream(source, sizes, kept), sizes, kept, tell))


def _told(
    blocks: Iterator[bytes],
    sizes: Mapping[str, int],
    kept: Mapping[str, int],
    tell: Callable[[float], object],
) -> Iterator[bytes]:
    there, total = sum(kept.get(name, 0) for name in sizes), max(1, sum(sizes.values()))
    for block in blocks:
        tell(min(1.0, there / total))
        yield block
        there += len(block)


def _stream(source: Path, sizes: Mapping[str, int], kept: Mapping[str, int]) -> Iterator[bytes]:
    """For each file a line of JSON that says how many bytes follow, and these."""
    for name, size in sizes.items():
        begin = kept.get(name, 0)
        yield json.dumps({"name": name, "size": size - begin}).encode() + b"\n"
        with (source / name).open("rb") as file:
            file.seek(begin)
            while block := file.read(BLOCK):
                yield block
