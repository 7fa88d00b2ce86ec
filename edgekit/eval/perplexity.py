"""Perplexity and bits per byte of a model on plain text, read in windows (`edgekit.eval.windows`).

Perplexity is exp of the mean cross-entropy; bits per byte divides the summed cross-entropy (in
bits) by the UTF-8 bytes of the text that was read.
"""

import math
from dataclasses import dataclass

import numpy as np

from edgekit.eval.reader import Floats, Integers, Reader
from edgekit.eval.windows import (
    Progress,
    Text,
    Window,
    WindowOptions,
    blocks,
    mean_interval,
)

__all__ = ["Perplexity", "perplexity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """The result.

    Attributes:
        engine: what computed it; `torch` for a source or student.
        interval: of the perplexity, 95 %, from the spread over windows; None with fewer than three.
        predictions: tokens predicted, that is, all but the first of each window.
        bytes: UTF-8 length of the text that was read.
    """

    engine: str
    perplexity: float
    interval: tuple[float, float] | None
    bits_per_byte: float
    tokens: int
    predictions: int
    windows: int
    bytes: int


def perplexity(
    reader: Reader, text: str, options: WindowOptions, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a model.

    Args:
        reader: opened with logits="all".
        text: what to read.
        options: windows.
        progress: called with a step's name, its number and the count of steps.

    Raises:
        UsageError: if the text is too short, or a window longer than a softmax layer's context.
    """
    whole = Text.read(reader, text, options)
    windows = list(whole.windows(options))
    nats = []
    for number, window in enumerate(windows):
        if progress is not None:
            progress(f"window {number + 1}", number, len(windows))
        nats.append(_nats(reader, window))
    predictions = sum(window.predictions for window in windows)
    mean = math.fsum(nats) / predictions
    means = [n / window.predictions for n, window in zip(nats, windows, strict=True)]
    spread = mean_interval(mean, means)
    return Perplexity(
        engine=reader.engine,
        perplexity=math.exp(mean),
        interval=None if spread is None else (math.exp(spread[0]), math.exp(spread[1])),
        bits_per_byte=math.fsum(nats) / math.log(2) / whole.bytes,
        tokens=len(whole.ids),
        predictions=predictions,
        windows=len(windows),
        bytes=whole.bytes,
    )


def _nats(reader: Reader, window: Window) -> float:
    """Summed cross-entropy of the tokens that count."""
    reading, total = reader.start(1), 0.0
    for ids, after, counted in blocks(window):
        logits = reading.append(ids)[0]  # [T, V]; row t predicts the token after ids[t]
        total += _cross_entropy(logits[counted], after[counted])
    return total


def _cross_entropy(logits: Floats, targets: Integers) -> float:
    """Summed over rows: logits `[T, V]`, targets `[T]`; in nats."""
    if not len(targets):
        return 0.0
    highest = logits.max(axis=1, keepdims=True)
    mass = np.exp(logits - highest).sum(axis=1, dtype=np.float64)
    chosen = np.take_along_axis(logits - highest, targets[:, None], axis=1)[:, 0]
    return float((np.log(mass) - chosen).sum())
