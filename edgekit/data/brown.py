"""The Brown corpus (Francis and Kucera, 1964) as running text, from its `word/tag` files."""

import re

__all__ = ["GENRES", "plain_text", "sentences"]

# The second letter of a document's id.
GENRES = {
    "a": "news",
    "b": "editorial",
    "c": "reviews",
    "d": "religion",
    "e": "hobbies",
    "f": "lore",
    "g": "belles_lettres",
    "h": "government",
    "j": "learned",
    "k": "fiction",
    "l": "mystery",
    "m": "science_fiction",
    "n": "adventure",
    "p": "romance",
    "r": "humor",
}

PARAGRAPH_GAP = 3  # blank lines; sentences are two apart
REPLACEMENTS = (
    (re.compile(r"`` ?"), "“"),
    (re.compile(r" ?''"), "”"),
    (re.compile(r" ([,.;:?!%)\]])"), r"\1"),
    (re.compile(r"([(\[$]) "), r"\1"),
    (re.compile(r"([;?!])\1+"), r"\1"),
)


def plain_text(tagged: str) -> str:
    """One document's paragraphs, a blank line apart, without tags and spaced as prose."""
    return "\n\n".join(" ".join(paragraph) for paragraph in _paragraphs(tagged))


def sentences(tagged: str) -> list[str]:
    """One document's sentences in order, without tags and spaced as prose."""
    return [sentence for paragraph in _paragraphs(tagged) for sentence in paragraph]


def _paragraphs(tagged: str) -> list[list[str]]:
    paragraphs: list[list[str]] = [[]]
    blank = 0
    for line in tagged.splitlines():
        items = line.split()
        if not items:
            blank += 1
            continue
        if blank >= PARAGRAPH_GAP and paragraphs[-1]:
            paragraphs.append([])
        blank = 0
        # A word may itself hold a slash ("1/2/cd").
        paragraphs[-1].append(_prose([item.rsplit("/", 1)[0] for item in items]))
    return [paragraph for paragraph in paragraphs if paragraph]


def _prose(words: list[str]) -> str:
    text = " ".join(words)
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text
