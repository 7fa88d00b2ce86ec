"""Movie review snippets with mean human ratings (Hutto and Gilbert, ICWSM 2014).

The file `movieReviewSnippets_GroundTruth.txt` has a line for each sentence: id, mean rating from -4
to 4, text, parted by tabs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgekit.data.archives import CorpusError, members_of

__all__ = ["Review", "read_reviews"]

INNER = "hutto_ICWSM_2014.tar.gz"
FILE = "movieReviewSnippets_GroundTruth.txt"
HIGHEST = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """One sentence of a review, and how good people found what it says: -4 to 4 on average."""

    number: int
    rating: float
    text: str


def read_reviews(files: Iterable[tuple[str, bytes]], where: Path) -> list[Review]:
    """The sentences in the source distribution of vaderSentiment 0.5.

    Args:
        files: names and contents of its files.
        where: named in errors.

    Raises:
        CorpusError: if the file is not there, or a line of it has another form.
    """
    for name, data in files:
        if name.endswith(f"/{INNER}"):
            inner = members_of(data, where / INNER)
            found = [content for member, content in inner if member.endswith(f"/{FILE}")]
            if found:
                return _parsed(found[0].decode("utf-8", errors="replace"), where)
    raise CorpusError(f"{where}: holds no {FILE} in {INNER}; give the sdist of vaderSentiment 0.5")


def _parsed(text: str, where: Path) -> list[Review]:
    # Not splitlines(), which takes more characters for the end of a line than the file does.
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    return [_review(line, f"{where}: {FILE} line {i}") for i, line in enumerate(lines, 1)]


def _review(line: str, where: str) -> Review:
    parts = line.split("\t")
    try:
        number, rating, text = int(parts[0]), float(parts[1]), " ".join(parts[2].split())
    except (ValueError, IndexError) as cause:
        raise CorpusError(f"{where}: {line!r:.60} is not id, rating and text") from cause
    if len(parts) != 3 or not math.isfinite(rating) or abs(rating) > HIGHEST or not text:
        raise CorpusError(f"{where}: {line!r:.60} is not id, rating and text")
    return Review(number=number, rating=rating, text=text)
