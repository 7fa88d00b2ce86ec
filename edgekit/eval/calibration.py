"""SPIN's settings for one model: tried on some pictures, judged on others.

Every head's score is averaged over the pictures first. Then each candidate describes the validation
half; the one that names the fewest absent objects (C_I) and keeps F1 is suggested. The same number
of heads chosen once and for all (`static`) is judged beside it, since heads that look little on
average need not be those that mislead. The other half, which nothing was chosen on, has the last
word.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from edgekit.config import dump
from edgekit.errors import UsageError
from edgekit.eval.chair import Chair
from edgekit.eval.describing import DESCRIBE, Described, chair_of
from edgekit.eval.objects import Vocabulary
from edgekit.eval.pictures import Annotated
from edgekit.models.spin import Score, SpinConfig
from edgekit.sources.picture_model import PictureModel
from edgekit.spin.static import HeadStatistics, fold_static, lowest_heads
from edgekit.spin.torch_form import apply, attention_modules

__all__ = ["Calibration", "CalibrationOptions", "Trial", "calibrate"]

Progress = Callable[[str, int, int], None]
F1_LOSS = 0.005  # of the validation half, which a candidate may lose at most
JOURNALS = "answers"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOptions:
    """What is tried.

    Attributes:
        suppress: numbers of heads.
        alpha: factors of a suppressed head.
        layers: ranges; None: all of them, and the first half.
        score: what heads are ranked by.
        question: what is asked of each picture.
        max_new_tokens: of a description.
        seed: of the halves.
    """

    suppress: tuple[int, ...] = (1, 2)
    alpha: tuple[float, ...] = (0.0, 0.08, 0.5)
    layers: tuple[tuple[int, int], ...] | None = None
    score: Score = "mass"
    question: str = DESCRIBE
    max_new_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One candidate on the validation half; `spin` is None for the plain model."""

    spin: SpinConfig | None
    figures: Chair


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was found.

    Attributes:
        model: what the user called it.
        spin: the suggestion; None: no candidate was better than the plain model.
        heads: the suggestion's lowest heads of each layer on average, for `static`.
        static_holds: whether those, chosen once and for all, are better than the plain model too.
        trials: every candidate on the validation half, the plain model first.
        static: the chosen heads there; None without a suggestion.
        test: the plain model, the suggestion and its static form on the other half.
        scores: mean score of every head, by layer.
        frequency: how often the suggestion suppresses each head on the other half, by layer.
    """

    model: str
    options: CalibrationOptions
    validation: int
    pictures: int
    spin: SpinConfig | None
    heads: dict[str, tuple[int, ...]]
    static_holds: bool
    trials: tuple[Trial, ...]
    static: Chair | None
    test: dict[str, Chair]
    scores: dict[str, tuple[float, ...]]
    frequency: dict[str, tuple[float, ...]]


def calibrate(
    model: PictureModel,
    pictures: Sequence[Annotated],
    vocabulary: Vocabulary,
    options: CalibrationOptions,
    *,
    folder: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Calibration:
    """Find settings for a model.

    Args:
        model: of `open_picture_model`.
        pictures: annotated in the vocabulary's terms, four or more.
        vocabulary: what objects are called.
        options: what is tried.
        folder: where answers are kept, so that the same call goes on after a kill; None: nowhere.
        progress: called with what is done, its number and the count.

    Raises:
        UsageError: for too few pictures, or settings that the model does not have.
    """
    if len(pictures) < 4:
        raise UsageError(f"{len(pictures)} pictures given; allowed: 4 or more, half to choose on")
    return _Calibrating(model, vocabulary, options, folder, progress).run(pictures)


class _Calibrating:
    """One calibration under way."""

    def __init__(
        self,
        model: PictureModel,
        vocabulary: Vocabulary,
        options: CalibrationOptions,
        folder: Path | None,
        progress: Progress,
    ) -> None:
        self._model, self._vocabulary, self._options = model, vocabulary, options
        self._folder, self._progress = folder, progress
        text = model.model.config.get_text_config(decoder=True)
        self._layers, self._heads = text.num_hidden_layers, text.num_attention_heads
        self._candidates = list(self._grid())
        self._steps = len(self._candidates) + 6  # and statistics, static, three on the other half
        self._step = 0

    def _grid(self) -> Iterator[SpinConfig]:
        layers = self._options.layers or ((0, self._layers), (0, max(self._layers // 2, 1)))
        given = self._options
        for span, suppress, alpha in product(dict.fromkeys(layers), given.suppress, given.alpha):
            spin = SpinConfig(suppress=suppress, alpha=alpha, layers=span, score=given.score)
            spin.kept(self._heads)
            spin.chosen(self._layers)
            yield spin

    def run(self, pictures: Sequence[Annotated]) -> Calibration:
        mixed = list(pictures)
        random.Random(self._options.seed).shuffle(mixed)
        half = len(mixed) // 2
        chosen_on, judged_on = mixed[:half], mixed[half:]
        scores = self._scores(chosen_on)
        plain = Trial(spin=None, figures=self._said("plain", chosen_on))
        trials = [plain, *(self._tried(n, spin, chosen_on) for n, spin in self._numbered())]
        best = _best(plain, trials[1:])
        spin = None if best is None else best.spin
        heads = {} if spin is None else _static_heads(scores, spin)
        static = None if spin is None else self._said_static("static", chosen_on, heads, spin)
        test, seen = self._judged(judged_on, spin, heads)
        return Calibration(
            model=self._model.source.name,
            options=self._options,
            validation=half,
            pictures=len(mixed),
            spin=spin,
            heads={str(layer): tuple(chosen) for layer, chosen in heads.items()},
            static_holds=static is not None and _holds(static, plain.figures),
            trials=tuple(trials),
            static=static,
            test=test,
            scores=_listed(scores.scores),
            frequency={} if seen is None else _listed(seen.frequency),
        )

    def _numbered(self) -> Iterator[tuple[int, SpinConfig]]:
        return enumerate(self._candidates, 1)

    def _scores(self, pictures: Sequence[Annotated]) -> HeadStatistics:
        """Of the plain model while it describes; never from a journal, which has words alone."""
        found = HeadStatistics()
        watching = SpinConfig(suppress=0, score=self._options.score)
        with apply(self._model.model, watching) as spin, spin.observed(found.observe):
            self._said("scores", pictures, keep=False)
        return found

    def _tried(self, number: int, spin: SpinConfig, pictures: Sequence[Annotated]) -> Trial:
        with apply(self._model.model, spin):
            return Trial(spin=spin, figures=self._said(f"trial-{number}", pictures, spin))

    def _said_static(
        self,
        name: str,
        pictures: Sequence[Annotated],
        heads: Mapping[int, Sequence[int]],
        spin: SpinConfig,
    ) -> Chair:
        with _folded(self._model.model, heads, spin.alpha):
            return self._said(name, pictures, {"heads": heads, "alpha": spin.alpha})

    def _judged(
        self,
        pictures: Sequence[Annotated],
        spin: SpinConfig | None,
        heads: Mapping[int, Sequence[int]],
    ) -> tuple[dict[str, Chair], HeadStatistics | None]:
        test = {"plain": self._said("test-plain", pictures)}
        if spin is None:
            return test, None
        seen = HeadStatistics(suppress=self._heads - spin.kept(self._heads))
        with apply(self._model.model, spin) as handle, handle.observed(seen.observe):
            test["spin"] = self._said("test-spin", pictures, spin, keep=False)
        test["static"] = self._said_static("test-static", pictures, heads, spin)
        return test, seen

    def _said(
        self, name: str, pictures: Sequence[Annotated], settings: Any = None, *, keep: bool = True
    ) -> Chair:
        """CHAIR of the model as it is at this moment."""
        self._progress(name, min(self._step, self._steps - 1), self._steps)
        self._step += 1
        journal = self._folder / JOURNALS / f"{name}.jsonl" if self._folder and keep else None
        model = self._model

        def say(question: str, image: Path, max_new_tokens: int) -> str:
            return model.answer(question, [image], max_new_tokens=max_new_tokens)

        described = Described(
            name=model.source.name,
            engine="torch",
            device=str(model.model.device),
            identity={"source": model.source.identity["sha256"], "settings": dump(settings)},
            say=say,
        )
        figures = chair_of(
            described,
            pictures,
            self._vocabulary,
            question=self._options.question,
            max_new_tokens=self._options.max_new_tokens,
            journal=journal,
        ).figures
        assert isinstance(figures, Chair)
        return figures


def _best(plain: Trial, trials: Sequence[Trial]) -> Trial | None:
    """The lowest C_I that keeps F1; None if all are worse than the plain model."""
    holding = [trial for trial in trials if _holds(trial.figures, plain.figures)]
    return min(holding, key=lambda trial: (trial.figures.c_i, -trial.figures.f1), default=None)


def _holds(found: Chair, plain: Chair) -> bool:
    return found.c_i < plain.c_i and found.f1 >= plain.f1 - F1_LOSS


def _static_heads(statistics: HeadStatistics, spin: SpinConfig) -> dict[int, list[int]]:
    assert spin.suppress is not None
    scores = statistics.scores
    return lowest_heads({layer: scores[layer] for layer in spin.chosen(len(scores))}, spin.suppress)


def _listed(by_layer: Mapping[int, torch.Tensor]) -> dict[str, tuple[float, ...]]:
    return {str(layer): tuple(values.tolist()) for layer, values in sorted(by_layer.items())}


@contextlib.contextmanager
def _folded(model: Any, heads: Mapping[int, Sequence[int]], alpha: float) -> Iterator[None]:
    """Chosen heads folded into the output projections while the context lasts."""
    modules: list[Any] = attention_modules(model)
    weights = [module.o_proj.weight for module in modules]
    before = [weight.detach().clone() for weight in weights]
    fold_static(model, heads, alpha)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
