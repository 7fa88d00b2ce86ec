"""Text for teacher-forced measures, cut into windows of W tokens that start S tokens apart.

Each window is read from an empty state, without a beginning-of-text token, and predicts its tokens
after the first; where windows overlap (S < W), only tokens that no earlier window predicted count.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.errors import UsageError
from edgekit.eval.reader import Integers, Reader

__all__ = ["BLOCK", "Progress", "Text", "Window", "WindowOptions", "blocks", "mean_interval"]

# Tokens per call: all-position logits of one call are this times the vocabulary, in fp32.
BLOCK = 256
Z_95 = 1.96

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowOptions:
    """How to read the text.

    Attributes:
        window: tokens per window.
        stride: tokens from one window's start to the next; None: `window`, no overlap.
        max_tokens: use only the first so many tokens; None: all.
    """

    window: int = 1024
    stride: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the option.
        """
        if self.window < 2:
            raise UsageError(f"window {self.window} given; allowed: 2 or more")
        if not 1 <= self.step <= self.window:
            raise UsageError(f"stride {self.stride} given; allowed: 1 to {self.window}, the window")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise UsageError(f"max-tokens {self.max_tokens} given; allowed: 2 or more")

    @property
    def step(self) -> int:
        """Tokens from one window's start to the next."""
        return self.window if self.stride is None else self.stride


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Token ids of one window; those from index `first` on are predicted."""

    ids: Integers
    first: int

    @property
    def predictions(self) -> int:
        """How many tokens count."""
        return len(self.ids) - self.first


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text in a model's tokens.

    Attributes:
        ids: token ids `[T]`, without special tokens.
        bytes: UTF-8 length of what they decode to.
    """

    ids: Integers
    bytes: int

    @classmethod
    def read(cls, reader: Reader, text: str, options: WindowOptions) -> "Text":
        """Tokenise as the model does.

        Raises:
            UsageError: if the text is too short, or a window longer than the model's context.
        """
        ids = reader.tokenizer.encode(text, add_special_tokens=False)[: options.max_tokens]
        if len(ids) < 2:
            raise UsageError(f"the text has {len(ids)} tokens; give at least 2")
        if reader.limit is not None and min(options.window, len(ids)) > reader.limit:
            raise UsageError(
                f"window {options.window} given; this model's context is {reader.limit}"
            )
        decoded = reader.tokenizer.decode(ids, skip_special_tokens=False)
        return cls(ids=ids, bytes=len(decoded.encode()))

    def windows(self, options: WindowOptions) -> Iterator[Window]:
        """The windows in order; none holds a single token."""
        predicted, total = 0, len(self.ids)
        for start in range(0, total - 1, options.step):
            end = min(start + options.window, total)
            yield Window(ids=self.ids[start:end], first=max(predicted, start + 1) - start)
            predicted = end
            if end == total:
                return


def blocks(window: Window) -> Iterator[tuple[Integers, Integers, slice]]:
    """What to read in turn: ids `[1, T]`, the token after each `[T]`, and the rows that count."""
    last = len(window.ids) - 1
    for begin in range(0, last, BLOCK):
        end = min(begin + BLOCK, last)
        counted = slice(max(window.first - begin - 1, 0), None)
        yield window.ids[None, begin:end], window.ids[begin + 1 : end + 1], counted


def mean_interval(mean: float, windows: Sequence[float]) -> tuple[float, float] | None:
    """95 % of a mean, from its spread over windows; None with fewer than three."""
    if len(windows) < 3:
        return None
    error = Z_95 * float(np.std(windows, ddof=1)) / math.sqrt(len(windows))
    return mean - error, mean + error
