"""Jane Austen's six novels out of the lazy-load database of R's janeaustenr, without R."""

import struct
import zlib

from edgekit.data.archives import CorpusError

__all__ = ["NOVELS", "novels"]

# In the order of the database's blocks.
NOVELS = (
    "emma",
    "mansfieldpark",
    "northangerabbey",
    "persuasion",
    "prideprejudice",
    "sensesensibility",
)

XDR, FIXED_HEADER = b"X\n", 14  # the format's mark; then three int32: versions of format and writer
CHARACTER_VECTOR, STRING = 16, 9  # SEXP types, the low byte of an item's flags


def novels(database: bytes) -> dict[str, str]:
    """The text of each novel, its lines as in the package, by name.

    Args:
        database: contents of `Rdata.rdb`: blocks of (length, zlib stream), one novel each.

    Raises:
        CorpusError: if the database is damaged or of another form.
    """
    texts = []
    while database:
        try:
            (size,) = struct.unpack_from(">I", database)
            unpacker = zlib.decompressobj()
            block = unpacker.decompress(database[4:])
            database = unpacker.unused_data
            if len(block) != size or not unpacker.eof:
                raise ValueError(f"a block holds {len(block)} of its {size} bytes")
            texts.append("\n".join(_strings(block)))
        except (struct.error, zlib.error, ValueError) as cause:
            raise CorpusError(f"janeaustenr's Rdata.rdb: damaged ({cause})") from cause
    if len(texts) != len(NOVELS):
        raise CorpusError(f"janeaustenr's Rdata.rdb: {len(texts)} blocks; expected {len(NOVELS)}")
    return dict(zip(NOVELS, texts, strict=True))


def _strings(data: bytes) -> list[str]:
    """A serialised character vector's elements; a missing one becomes an empty line."""
    if not data.startswith(XDR):
        raise ValueError("not in R's XDR form")
    (version,) = struct.unpack_from(">i", data, len(XDR))
    at = FIXED_HEADER
    if version == 3:  # names its text encoding
        (length,) = struct.unpack_from(">i", data, at)
        at += 4 + length
    flags, count = struct.unpack_from(">ii", data, at)
    at += 8
    if flags & 0xFF != CHARACTER_VECTOR:
        raise ValueError("not a character vector")
    lines = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", data, at)
        if flags & 0xFF != STRING:
            raise ValueError(f"no string at byte {at}")
        at += 8 + max(length, 0)
        lines.append(data[at - max(length, 0) : at].decode("utf-8"))
    return lines
