"""How far a model says what its teacher says, on plain text read in windows.

Both read the same tokens. Over every position: the Kullback-Leibler divergence of the teacher's
distribution from the model's; how often both put the same token first; and how often the teacher
was right about the next token where the model puts another first (a flip). Likelihood alone hides
flips: gains elsewhere cancel them (arXiv 2407.09141).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.errors import UsageError
from edgekit.eval.reader import Floats, Integers, Reader
from edgekit.eval.windows import (
    Progress,
    Text,
    Window,
    WindowOptions,
    blocks,
    mean_interval,
)

__all__ = ["Agreement", "Estimate", "agreement"]

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over positions.

    Attributes:
        interval: 95 %, from the spread over windows; None with fewer than three.
    """

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """The result.

    Attributes:
        engine: what read the model; `torch` for a source or student.
        teacher: what the teacher is called.
        kl: mean KL(teacher || model), in nats.
        top1: share of positions where both put the same token first.
        flips: share of positions where the teacher's first token is the text's and the model's is
            another.
        teacher_accuracy: share of positions where the teacher's first token is the text's.
    """

    engine: str
    teacher: str
    kl: Estimate
    top1: Estimate
    flips: Estimate
    teacher_accuracy: float
    predictions: int
    windows: int


def agreement(
    reader: Reader,
    teacher: Reader,
    text: str,
    options: WindowOptions,
    progress: Progress | None = None,
) -> Agreement:
    """Compare a model with its teacher.

    Args:
        reader: the model, opened with logits="all".
        teacher: likewise.
        text: what both read.
        options: windows.
        progress: called with a step's name, its number and the count of steps.

    Raises:
        UsageError: if the two see different tokens or vocabularies, the text is too short, or a
            window is longer than the context of either.
    """
    whole = Text.read(teacher, text, options)
    if not np.array_equal(Text.read(reader, text, options).ids, whole.ids):
        raise UsageError(
            f"{reader.name} and {teacher.name} cut the text into different tokens; "
            "give the model's own teacher"
        )
    windows = list(whole.windows(options))
    sums = []
    for number, window in enumerate(windows):
        if progress is not None:
            progress(f"window {number + 1}", number, len(windows))
        sums.append(_compare(reader, teacher, window))
    table, counts = np.array(sums), np.array([window.predictions for window in windows])
    return Agreement(
        engine=reader.engine,
        teacher=teacher.name,
        kl=_estimate(table[:, 0], counts, math.inf),
        top1=_estimate(table[:, 1], counts, 1.0),
        flips=_estimate(table[:, 2], counts, 1.0),
        teacher_accuracy=float(table[:, 3].sum() / counts.sum()),
        predictions=int(counts.sum()),
        windows=len(windows),
    )


def _compare(reader: Reader, teacher: Reader, window: Window) -> Sums:
    """Sums over the window: nats, agreements, flips, and tokens that the teacher had right."""
    ours, theirs, total = reader.start(1), teacher.start(1), np.zeros(4)
    for ids, after, counted in blocks(window):
        logits, reference = ours.append(ids)[0], theirs.append(ids)[0]
        if logits.shape != reference.shape:
            raise UsageError(
                f"{reader.name} has {logits.shape[1]} tokens in its vocabulary, {teacher.name} "
                f"{reference.shape[1]}; give the model's own teacher"
            )
        total += _block_sums(logits[counted], reference[counted], after[counted])
    return total


def _block_sums(logits: Floats, reference: Floats, after: Integers) -> Sums:
    ours, theirs = _log_softmax(logits), _log_softmax(reference)
    nats = (np.exp(theirs) * (theirs - ours)).sum(dtype=np.float64)
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    right = theirs.argmax(axis=1) == after
    return np.array([nats, same.sum(), (right & ~same).sum(), right.sum()], dtype=np.float64)


def _log_softmax(logits: Floats) -> Floats:
    """Over the last axis of `[T, V]`, T may be 0."""
    if not len(logits):
        return logits
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _estimate(sums: Sums, counts: Integers, highest: float) -> Estimate:
    value = float(sums.sum() / counts.sum())
    spread = mean_interval(value, (sums / counts).tolist())
    if spread is None:
        return Estimate(value=value, interval=None)
    return Estimate(value=value, interval=(max(0.0, spread[0]), min(highest, spread[1])))
