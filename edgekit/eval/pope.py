"""POPE: does a model say yes to objects that are not in the picture (arXiv 2305.10355)?

An answer with `no`, `not` or a word in n't is a no; else one with `yes` is a yes; any other is
invalid, counted and wrong, never left out. The share of yes stands beside every figure, since a
model that always agrees is right on half of the questions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgekit.errors import UsageError
from edgekit.wilson import wilson

__all__ = ["Pope", "Verdict", "pope", "verdict"]

Verdict = Literal["yes", "no", "invalid"]
NO = re.compile(r"\b(?:no|not)\b|n['\u2019]t\b", re.IGNORECASE)
YES = re.compile(r"\byes\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pope:
    """The figures of yes-or-no questions.

    Attributes:
        interval: of the accuracy, Wilson's, 95 %.
        precision: share of the yeses that are right; recall: of the objects there that got one.
        yes_ratio: share of all answers that are a yes.
        invalid: answers that are neither.
    """

    questions: int
    accuracy: float
    interval: tuple[float, float]
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    invalid: int


def verdict(answer: str) -> Verdict:
    """What an answer says."""
    if NO.search(answer):
        return "no"
    return "yes" if YES.search(answer) else "invalid"


def pope(answers: Sequence[tuple[str, bool]]) -> Pope:
    """Sum answers up.

    Args:
        answers: what the model said, and whether the object is there.

    Raises:
        UsageError: if there is none.
    """
    if not answers:
        raise UsageError("no answer given; give one or more")
    said = [(verdict(answer), there) for answer, there in answers]
    count, right = len(said), sum(v == ("yes" if there else "no") for v, there in said)
    yes = sum(v == "yes" for v, _ in said)
    hits = sum(v == "yes" and there for v, there in said)
    objects = sum(there for _, there in said)
    precision, recall = hits / yes if yes else 0.0, hits / objects if objects else 0.0
    return Pope(
        questions=count,
        accuracy=right / count,
        interval=wilson(right, count),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_ratio=yes / count,
        invalid=sum(v == "invalid" for v, _ in said),
    )
