"""CHAIR: how many of the objects that captions name are not in the picture (arXiv 1809.02156).

    C_I        mentions of absent objects / mentions, with repetition
    C_S        captions with at least one such mention / captions
    recall     sum |truth & named| / sum |truth|
    precision  sum |truth & named| / sum |named|            F1 is their harmonic mean

Saying less lowers C_I and C_S, so recall, F1 and length always stand beside them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgekit.errors import UsageError
from edgekit.eval.objects import WORD, Vocabulary
from edgekit.wilson import wilson

__all__ = ["Captioned", "Chair", "captioned", "chair"]

RESAMPLES, TAIL = 1000, 0.025


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioned:
    """One caption, read.

    Attributes:
        truth: objects of the picture.
        mentions: objects that the caption names, with repetition.
        words: of the caption.
    """

    truth: frozenset[str]
    mentions: tuple[str, ...]
    words: int

    @property
    def absent(self) -> int:
        """Mentions of what is not there."""
        return sum(name not in self.truth for name in self.mentions)

    @property
    def found(self) -> int:
        """Objects of the picture that are named."""
        return len(self.truth.intersection(self.mentions))


@dataclass(frozen=True, kw_only=True, slots=True)
class Chair:
    """The figures; intervals are 95 %: Wilson's of `c_s`, else a bootstrap over captions.

    Attributes:
        objects: different objects per caption, mean.
        words: per caption, mean.
    """

    captions: int
    c_s: float
    c_s_interval: tuple[float, float]
    c_i: float
    c_i_interval: tuple[float, float]
    recall: float
    precision: float
    f1: float
    f1_interval: tuple[float, float]
    objects: float
    words: float


def captioned(caption: str, truth: Sequence[str], vocabulary: Vocabulary) -> Captioned:
    """Read a caption.

    Args:
        caption: what a model said.
        truth: the picture's objects, in the vocabulary's terms.
        vocabulary: what objects are called.

    Raises:
        UsageError: if an object of `truth` is not in the vocabulary.
    """
    there = []
    for term in truth:
        named = vocabulary.mentions(term)
        if len(named) != 1:
            raise UsageError(f"object {term!r} is not in the vocabulary; add it there")
        there += named
    return Captioned(
        truth=frozenset(there),
        mentions=tuple(vocabulary.mentions(caption)),
        words=len(WORD.findall(caption)),
    )


def chair(captions: Sequence[Captioned]) -> Chair:
    """Sum captions up.

    Raises:
        UsageError: if there is none.
    """
    if not captions:
        raise UsageError("no caption given; give one or more")
    count = len(captions)
    wrong = sum(caption.absent > 0 for caption in captions)
    return Chair(
        captions=count,
        c_s=wrong / count,
        c_s_interval=wilson(wrong, count),
        c_i=_absent_share(captions),
        c_i_interval=_bootstrap(_absent_share, captions),
        recall=_recall(captions),
        precision=_precision(captions),
        f1=_f1(captions),
        f1_interval=_bootstrap(_f1, captions),
        objects=sum(len(set(caption.mentions)) for caption in captions) / count,
        words=sum(caption.words for caption in captions) / count,
    )


def _absent_share(captions: Sequence[Captioned]) -> float:
    return _share(sum(c.absent for c in captions), sum(len(c.mentions) for c in captions))


def _recall(captions: Sequence[Captioned]) -> float:
    return _share(sum(c.found for c in captions), sum(len(c.truth) for c in captions))


def _precision(captions: Sequence[Captioned]) -> float:
    return _share(sum(c.found for c in captions), sum(len(set(c.mentions)) for c in captions))


def _f1(captions: Sequence[Captioned]) -> float:
    recall, precision = _recall(captions), _precision(captions)
    return _share(2 * recall * precision, recall + precision)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _bootstrap(
    figure: Callable[[Sequence[Captioned]], float], captions: Sequence[Captioned]
) -> tuple[float, float]:
    """The middle 95 % of the figure over captions drawn with replacement."""
    rng = random.Random(len(captions))
    drawn = sorted(figure(rng.choices(captions, k=len(captions))) for _ in range(RESAMPLES))
    low = int(TAIL * RESAMPLES)
    return drawn[low], drawn[-1 - low]
