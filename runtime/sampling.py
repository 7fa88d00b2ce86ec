"""From logits to the next token: greedy choice, or sampling from a truncated distribution.

The steps and their order are those of transformers: repetition penalty, temperature, top-k, top-p,
min-p. Each truncation is also llama.cpp's: top-k keeps the k best, top-p the smallest set of the
best whose probability reaches p, min-p what is at least p times as likely as the best.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from edgekit.errors import UsageError
from edgekit.runtime.engine import Floats, Integers

__all__ = ["GenerationOptions", "GenerationSettings", "Sampler", "candidates", "penalise"]

FIRST_LOOK = 1024  # sorting this many candidates is nearly always enough to fill top-p


class GenerationSettings(TypedDict, total=False):
    """`GenerationOptions` as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    num_beams: int
    ignore_eos: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: stop after this many tokens.
        temperature: 0 takes the likeliest token; above it, logits are divided by it and sampled.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest; 0 keeps all.
        repetition_penalty: divides (multiplies, where negative) the logits of tokens seen so far.
        seed: makes sampling repeatable; None draws a new one each time.
        stop: strings that end the text; they are not part of it. One string may be given alone.
        num_beams: above 1, beam search with this many beams instead of sampling.
        ignore_eos: go on past the model's end-of-text tokens.

    Raises:
        UsageError: for a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_beams: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check every range."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _require_integer("max_new_tokens", self.max_new_tokens, 1)
        _require_integer("top_k", self.top_k, 0)
        _require_integer("num_beams", self.num_beams, 1)
        if self.seed is not None:
            _require_integer("seed", self.seed, 0)
        self._require("temperature", lambda value: value >= 0, "0 or more")
        self._require("top_p", lambda value: 0 < value <= 1, "above 0, up to 1")
        self._require("min_p", lambda value: 0 <= value <= 1, "0 to 1")
        self._require("repetition_penalty", lambda value: value > 0, "above 0")
        if not all(isinstance(text, str) and text for text in stop):
            raise UsageError(f"stop {stop!r} given; allowed: strings of one character or more")
        if self.num_beams > 1 and self.temperature > 0:
            raise UsageError(
                f"num_beams {self.num_beams} and temperature {self.temperature} given; "
                "beam search does not sample: leave one of them out"
            )

    def _require(self, name: str, holds: Callable[[float], bool], allowed: str) -> None:
        value = getattr(self, name)
        if not (isinstance(value, int | float) and np.isfinite(value) and holds(value)):
            raise UsageError(f"{name} {value!r} given; allowed: {allowed}")

    @classmethod
    def of(cls, settings: GenerationSettings) -> "GenerationOptions":
        """The options that keyword arguments ask for.

        Raises:
            UsageError: for an unknown name or a value outside its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise UsageError(
                f"generation option {unknown[0]!r} is unknown; known: {', '.join(known)}"
            )
        values: dict[str, Any] = dict(settings)
        return cls(**values)


def _require_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} {value!r} given; allowed: a whole number, {least} or more")


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, options: GenerationOptions, prompt: Integers, vocab: int, row: int) -> None:
        """Start after `prompt [T]`.

        Args:
            options: how to choose.
            prompt: ids that count as seen for the repetition penalty.
            vocab: V, entries of the logits.
            row: which row of a batch this is, so that rows of one seed differ.
        """
        self._options = options
        self._random = np.random.default_rng(None if options.seed is None else [options.seed, row])
        self._seen = np.zeros(vocab, dtype=bool) if options.repetition_penalty != 1.0 else None
        if self._seen is not None:
            self._seen[prompt] = True

    def __call__(self, logits: Floats) -> int:
        """The next token given its logits `[V]`, which are left as they are."""
        if self._seen is not None:
            logits = penalise(logits, self._seen, self._options.repetition_penalty)
        token = self._choose(logits)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _choose(self, logits: Floats) -> int:
        if self._options.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = candidates(logits, self._options)
        cumulative = probabilities.cumsum()
        point = self._random.random() * cumulative[-1]
        return int(tokens[min(np.searchsorted(cumulative, point, side="right"), len(tokens) - 1)])


def penalise(logits: Floats, seen: npt.NDArray[np.bool_], penalty: float) -> Floats:
    """Logits with those of `seen` tokens divided by `penalty` (multiplied, where negative)."""
    scaled = np.where(logits < 0, logits * np.float32(penalty), logits / np.float32(penalty))
    return np.where(seen, scaled, logits)


def candidates(
    logits: Floats, options: GenerationOptions
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The tokens that may be drawn and their probabilities, likeliest first.

    Args:
        logits: `[V]`.
        options: temperature (above 0), top_k, top_p and min_p.

    Returns:
        token ids `[n]` and fp64 probabilities `[n]` that sum to 1.
    """
    scores = logits.astype(np.float64) / options.temperature
    mass = np.exp(scores - scores.max())
    count = min(options.top_k or len(mass), len(mass))
    tokens = _best(mass, _needed(mass, count, options))
    kept = mass[tokens]
    whole = mass.sum() if count == len(mass) else kept[:count].sum()
    before = kept.cumsum() - kept
    keep = before < options.top_p * whole
    keep &= kept >= options.min_p * kept[0]
    keep[0] = True
    keep[count:] = False
    return tokens[keep], kept[keep] / kept[keep].sum()


def _needed(mass: npt.NDArray[np.float64], count: int, options: GenerationOptions) -> int:
    """How many of the likeliest tokens must be looked at in order."""
    if count < len(mass) or count <= FIRST_LOOK or options.top_p == 1.0:
        return count
    best = np.partition(mass, len(mass) - FIRST_LOOK)[-FIRST_LOOK:]
    return FIRST_LOOK if best.sum() >= options.top_p * mass.sum() else count


def _best(mass: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    """The `count` largest entries of `mass`, largest first; ties keep the lower index first."""
    if count >= len(mass):
        return np.argsort(-mass, kind="stable")
    chosen = np.sort(np.argpartition(-mass, count - 1)[:count])
    return chosen[np.argsort(-mass[chosen], kind="stable")]
