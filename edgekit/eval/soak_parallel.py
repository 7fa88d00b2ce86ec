"""Sessions in parallel threads on one compiled model: each says what one alone says."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import numpy as np

from edgekit.eval.reader import Floats, Integers
from edgekit.runtime import Session
from edgekit.runtime.workload import greedy

__all__ = ["Parallel", "in_parallel"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """What sessions said side by side.

    Attributes:
        sessions: in as many threads.
        read: tokens of the prompt, the same for all.
        written: greedy tokens after it.
        equal: sessions whose tokens are all those of a session that was alone.
        max_abs: largest difference of their last logits from those of that session.
    """

    sessions: int
    read: int
    written: int
    equal: int
    max_abs: float


def in_parallel(
    start: Callable[[], Session], ids: Integers, *, sessions: int, tokens: int
) -> Parallel:
    """Let one session read and write alone, then several at the same time.

    Args:
        start: makes a session of the model.
        ids: the prompt `[T]`.
        sessions: how many, 1 or more.
        tokens: written by each, 1 or more.
    """
    expected, logits = _said(start(), ids, tokens)
    together = Barrier(sessions)

    def said(session: Session) -> tuple[list[int], Floats]:
        together.wait()
        return _said(session, ids, tokens)

    with ThreadPoolExecutor(sessions) as pool:
        found = list(pool.map(said, [start() for _ in range(sessions)]))
    return Parallel(
        sessions=sessions,
        read=len(ids),
        written=tokens,
        equal=sum(output == expected for output, _ in found),
        max_abs=max(float(np.abs(last - logits).max()) for _, last in found),
    )


def _said(session: Session, ids: Integers, tokens: int) -> tuple[list[int], Floats]:
    """The greedy continuation, and the logits after its last token was read once more."""
    _, output = greedy(session, session.append(ids), tokens)
    return output, session.append(output[-1:])
