"""SPIN on the glyph world: settings chosen on some pictures, figures measured on others."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from edgekit.config import dump
from edgekit.eval.chair import Chair, chair
from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.lawcat import LawcatModel
from edgekit.eval.glyphs.methods import (
    Control,
    Method,
    contrasted_captions,
    plain_captions,
    said,
    spun_captions,
)
from edgekit.eval.glyphs.model import Model
from edgekit.models.spin import SpinConfig
from edgekit.spin.static import HeadStatistics, fold_static, lowest_heads
from edgekit.spin.torch_form import apply

__all__ = ["CONTROLS", "Scenes", "chosen_settings", "measured"]

SUPPRESS, ALPHAS, LAYERS = (1, 2, 3), (0.0, 0.08, 0.5), (None, (0, 2))
VALIDATION, TEST = 1, 2  # which random numbers
CONTROLS: tuple[Control, ...] = ("random", "inverted")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Scenes:
    """Pictures `[N, 3, SIDE, SIDE]` of scenes that surprise, and what each shows."""

    pixels: torch.Tensor
    drawn: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, part: int, count: int) -> "Scenes":
        """The same pictures for every model: `VALIDATION` or `TEST`."""
        rng = np.random.default_rng([999, part])
        drawn = [world.draw_scene(rng, world.SURPRISING).drawn for _ in range(count)]
        pixels = [world.picture(rng, objects) for objects in drawn]
        return cls(torch.from_numpy(np.stack(pixels)), tuple(drawn))

    def score(self, captions: Sequence[Sequence[int]]) -> Chair:
        """CHAIR of one caption per picture."""
        return chair([said(c, d) for c, d in zip(captions, self.drawn, strict=True)])


def chosen_settings(
    model: Model, scenes: Scenes, baseline: Chair, score: str, progress: Progress
) -> SpinConfig:
    """The settings with the fewest absent objects whose F1 is at least `baseline`'s.

    Where none is, those with the best F1.
    """
    grid = list(itertools.product(SUPPRESS, ALPHAS, LAYERS))
    found: list[tuple[tuple[bool, float], SpinConfig]] = []
    for number, (suppress, alpha, layers) in enumerate(grid):
        progress(f"choosing settings of {score}", number, len(grid))
        spin = SpinConfig(suppress=suppress, alpha=alpha, layers=layers, score=score)  # type: ignore[arg-type]
        figures = scenes.score(spun_captions(model, scenes.pixels, Method(spin=spin)))
        fair = figures.f1 >= baseline.f1
        found.append(((not fair, figures.c_i if fair else -figures.f1), spin))
    return min(found, key=lambda pair: pair[0])[1]


def measured(model: Model, *, seed: int, scenes: int, progress: Progress) -> dict[str, Any]:
    """Figures of one trained model, JSON-ready: by method, its settings and its `Chair`.

    Args:
        model: a trained one.
        seed: of chance.
        scenes: pictures to choose on, and as many to measure on.
        progress: called with a step's name, its number and the count of steps.
    """
    validation, test = Scenes.of(VALIDATION, scenes), Scenes.of(TEST, scenes)
    plain = validation.score(spun_captions(model, validation.pixels, Method()))
    scores = ("mass",) if isinstance(model, LawcatModel) else ("mass", "logit")
    spins = {s: chosen_settings(model, validation, plain, s, progress) for s in scores}
    mass = spins["mass"]
    methods = {"baseline": Method(), **{s: Method(spin=spin) for s, spin in spins.items()}}
    methods |= {c: Method(spin=mass, control=c, seed=seed) for c in CONTROLS}
    results = {}
    for number, (name, method) in enumerate(methods.items()):
        progress("captions", number, len(methods) + 2)
        figures = test.score(spun_captions(model, test.pixels, method))
        results[name] = {"spin": dump(method.spin), **dump(figures)}
    progress("captions", len(methods), len(methods) + 2)
    results["static"] = _static(model, mass, validation, test)
    progress("captions", len(methods) + 1, len(methods) + 2)
    contrast = test.score(contrasted_captions(model, test.pixels, strength=1.0, seed=seed))
    results["contrast"] = {"spin": None, **dump(contrast)}
    return results


def _static(model: Model, spin: SpinConfig, validation: Scenes, test: Scenes) -> dict[str, Any]:
    """The heads with the lowest mean score, turned down for every token."""
    mean = _mean_scores(model, replace(spin, alpha=1.0), validation.pixels)
    heads = lowest_heads(mean.scores, spin.suppress or 0)
    folded = copy.deepcopy(model)
    if isinstance(folded, LawcatModel):
        folded.fold_static(heads, spin.alpha)
    else:
        fold_static(folded, heads, spin.alpha)
    figures = test.score(plain_captions(folded, test.pixels))
    return {"spin": dump(spin), "heads": {str(k): v for k, v in heads.items()}, **dump(figures)}


def _mean_scores(model: Model, inert: SpinConfig, pixels: torch.Tensor) -> HeadStatistics:
    """Of each head while it captions, turned down by nothing."""
    mean = HeadStatistics()
    if isinstance(model, LawcatModel):

        def watch(layer: int, scores: torch.Tensor) -> None:
            last = scores[:, -1:]
            mean.observe(layer, last, torch.ones(last.shape[:2], dtype=torch.bool))

        with model.turned_down(inert, watcher=watch):
            plain_captions(model, pixels)
        return mean
    spin = replace(inert, image_token_ids=(world.IMAGE,))
    with apply(model, spin) as handle, handle.observed(mean.observe):
        plain_captions(model, pixels)
    return mean
