"""Perplexity and bits per byte of a bundle, or of a source in PyTorch, on plain text.

The text is cut into windows of W tokens, stride S apart. Each window is read from an empty state,
without a beginning-of-text token, and predicts its tokens after the first; where windows overlap
(S < W), only tokens that no earlier window predicted count. Perplexity is exp of the mean
cross-entropy; bits per byte divides the summed cross-entropy (in bits) by the UTF-8 bytes of the
text that was read.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import UsageError

__all__ = ["Options", "Perplexity", "bundle_perplexity", "source_perplexity"]

# Tokens per call: all-position logits of one call are this times the vocabulary, in fp32.
BLOCK = 256
Z_95 = 1.96

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Read = Callable[[Integers], Floats]
Start = Callable[[], Read]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
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
class Perplexity:
    """The result.

    Attributes:
        engine: what computed it; `torch` for a source.
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


def bundle_perplexity(
    bundle: str | Path,
    text: str,
    options: Options,
    *,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a bundle, through `edgekit.runtime` and without torch.

    Args:
        bundle: its directory.
        text: what to read.
        options: windows.
        engine: `openvino` or `onnx`; None: as `edgekit.runtime.load` chooses.
        device: the engine's device name; None: the target's.
        threads: CPU threads; None: the target's, or else the engine's choice.
        progress: called with a step's name, its number and the count of steps.

    Raises:
        BundleError: if the bundle is damaged.
        EngineError: if the engine or device is missing.
        UsageError: if the text is too short, or a window longer than a softmax layer's context.
    """
    from edgekit.runtime import load

    model = load(bundle, engine=engine, device=device, threads=threads, logits="all")

    def start() -> Read:
        session = model.session()
        return lambda ids: session.append(ids)[0]

    limit = model.manifest.model.context_length
    whole = _Text.read(Path(bundle), text, options, limit)
    return _perplexity(model.engine, start, whole, options, progress)


def source_perplexity(
    source: str | Path, text: str, options: Options, *, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a source (`edgekit.sources.open_source`) in PyTorch, fp32.

    Args:
        source: a Hugging Face directory or Hub id, a `.gguf` file, or a built-in name.
        text: what to read.
        options: windows.
        progress: as `bundle_perplexity`.

    Raises:
        SourceError: if the source cannot be read.
        UsageError: as `bundle_perplexity`.
    """
    import torch

    from edgekit.models.decoder import Decoder
    from edgekit.sources import open_source

    opened = open_source(source)
    decoder = Decoder.from_store(opened.config, opened.weights)

    def start() -> Read:
        state: Any = None

        def read(ids: Integers) -> Floats:
            nonlocal state
            with torch.inference_mode():
                logits, state = decoder(torch.from_numpy(ids)[None], state=state)
            array: Floats = logits[0].numpy()
            return array

        return read

    limit = opened.config.context_length
    whole = _Text.read(opened.directory, text, options, limit)
    return _perplexity("torch", start, whole, options, progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    ids: Integers
    bytes: int

    @classmethod
    def read(cls, directory: Path, text: str, options: Options, limit: int | None) -> "_Text":
        """Tokenise as the model does, without special tokens."""
        from edgekit.runtime.text import Tokenizer

        tokenizer = Tokenizer(directory)
        ids = tokenizer.encode(text, add_special_tokens=False)[: options.max_tokens]
        if len(ids) < 2:
            raise UsageError(f"the text has {len(ids)} tokens; give at least 2")
        if limit is not None and min(options.window, len(ids)) > limit:
            raise UsageError(f"window {options.window} given; this model's context is {limit}")
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        return cls(ids=ids, bytes=len(decoded.encode()))


def _perplexity(
    engine: str, start: Start, text: _Text, options: Options, progress: Progress | None
) -> Perplexity:
    spans = list(_spans(len(text.ids), options))
    nats = []
    for number, (a, b, first) in enumerate(spans):
        if progress is not None:
            progress(f"window {number + 1}", number, len(spans))
        nats.append(_window_nats(start(), text.ids[a:b], first - a))
    counts = [b - first for _, b, first in spans]
    mean = math.fsum(nats) / sum(counts)
    return Perplexity(
        engine=engine,
        perplexity=math.exp(mean),
        interval=_interval(mean, [n / c for n, c in zip(nats, counts, strict=True)]),
        bits_per_byte=math.fsum(nats) / math.log(2) / text.bytes,
        tokens=len(text.ids),
        predictions=sum(counts),
        windows=len(spans),
        bytes=text.bytes,
    )


def _spans(total: int, options: Options) -> Iterator[tuple[int, int, int]]:
    """(start, end, first token predicted) of each window; none holds a single token."""
    predicted = 0
    for start in range(0, total - 1, options.step):
        end = min(start + options.window, total)
        yield start, end, max(predicted, start + 1)
        predicted = end
        if end == total:
            return


def _window_nats(read: Read, ids: Integers, first: int) -> float:
    """Summed cross-entropy of `ids[first:]`, each given those before it, in nats."""
    total = 0.0
    for begin in range(0, len(ids) - 1, BLOCK):
        block = ids[begin : min(begin + BLOCK, len(ids) - 1)]
        logits = read(block)  # [T, V]; row t predicts the token after block[t]
        after = ids[begin + 1 : begin + 1 + len(block)]
        scored = slice(max(first - begin - 1, 0), None)
        total += _cross_entropy(logits[scored], after[scored])
    return total


def _cross_entropy(logits: Floats, targets: Integers) -> float:
    """Summed over rows: logits `[T, V]`, targets `[T]`; in nats."""
    if not len(targets):
        return 0.0
    highest = logits.max(axis=1, keepdims=True)
    mass = np.exp(logits - highest).sum(axis=1, dtype=np.float64)
    chosen = np.take_along_axis(logits - highest, targets[:, None], axis=1)[:, 0]
    return float((np.log(mass) - chosen).sum())


def _interval(mean: float, windows: Sequence[float]) -> tuple[float, float] | None:
    if len(windows) < 3:
        return None
    error = Z_95 * float(np.std(windows, ddof=1)) / math.sqrt(len(windows))
    return math.exp(mean - error), math.exp(mean + error)
