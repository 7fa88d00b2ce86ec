"""Which questions and answers of a small model are worth training on."""

import re

__all__ = ["flaw_of_answer", "flaw_of_question", "whole_paragraphs"]

MARKUP = re.compile(r"<\|\w*\|?>?")  # pieces of chat markers
SHORTEST_QUESTION, LONGEST_QUESTION = 8, 400  # characters
SHORTEST_PART = 150  # characters of an answer that was cut off
FENCE = "```"
PLAIN_SHARE = 0.95  # of characters that are ASCII; typographic quotes and accents are in the rest
WORDS = 4  # an n-gram that a text should not keep repeating
DISTINCT_SHARE = 0.7  # of its n-grams, at least


def flaw_of_question(text: str) -> str | None:
    """What is wrong with a question, in a word or two; None if nothing is."""
    if len(text) < SHORTEST_QUESTION:
        return "too short"
    return "too long" if len(text) > LONGEST_QUESTION else _flaw(text)


def flaw_of_answer(text: str) -> str | None:
    """What is wrong with an answer, in a word or two; None if nothing is."""
    return _flaw(text) if text else "empty"


def whole_paragraphs(text: str) -> str:
    """A text that was cut off, without its last paragraph; empty if too little would be left."""
    kept = text.rpartition("\n\n")[0].rstrip()
    whole = len(kept) >= SHORTEST_PART and not kept.endswith(":") and not kept.count(FENCE) % 2
    return kept if whole else ""


def _flaw(text: str) -> str | None:
    if MARKUP.search(text):
        return "markup"
    plain = sum(c.isascii() and (c.isprintable() or c.isspace()) for c in text)
    if plain < PLAIN_SHARE * len(text):
        return "not plain text"
    words = text.lower().split()
    grams = [tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]
    return "repeats itself" if len(set(grams)) < DISTINCT_SHARE * len(grams) else None
