"""Captions of the glyph world's bundles, beside those of PyTorch, and how fast they are written."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgekit.eval.chair import Chair
from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.experiment import Scenes
from edgekit.eval.glyphs.methods import NEW_TOKENS, Method, next_logits, spun_captions
from edgekit.eval.glyphs.model import Model, prompt
from edgekit.runtime import Model as Bundle
from edgekit.runtime import load
from edgekit.runtime.vision import PIXELS, Seen
from edgekit.targets.schema import ENGINES

__all__ = ["TORCH", "Difference", "Place", "Spread", "Written", "deployed", "differences", "write"]

TORCH = "PyTorch"
BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and between what the middle half lies."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """The spread of some values; None where there is none."""
        if not values:
            return None
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median, low, high)

    def written(self, digits: int) -> str:
        """In words, with so many digits after the point."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Written:
    """One caption of a bundle, tokens after `BOS WITH`, and tokens/s; None: nothing to measure."""

    tokens: list[int]
    rate: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Where a caption first is not PyTorch's.

    Attributes:
        scene: its number, from 0.
        position: in the caption, from 0.
        expected: PyTorch's token there, EOS at the end.
        found: the bundle's.
        gap: PyTorch's logit of its own token less that of the bundle's. Under SPIN a near tie of
            two heads' scores, which this does not show, is another reason to differ.
    """

    scene: int
    position: int
    expected: int
    found: int
    gap: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One method of one seed somewhere.

    Attributes:
        seed: of the model.
        method: `baseline`, or the score of SPIN.
        engine: `TORCH`, `openvino` or `onnx`.
        figures: of all captions.
        differences: captions that are not PyTorch's.
        rate: tokens/s of decoding, by caption; None: not measured.
        ratio: the same over the baseline's on the same picture; None for the baseline.
    """

    seed: int
    method: str
    engine: str
    figures: Chair
    differences: tuple[Difference, ...] = ()
    rate: Spread | None = None
    ratio: Spread | None = None


def deployed(
    seed: int,
    model: Model,
    methods: Mapping[str, Method],
    bundles: Mapping[str, Path],
    scenes: Scenes,
    *,
    threads: int | None = None,
) -> list[Place]:
    """Caption the same scenes in PyTorch and with bundles on every engine.

    Args:
        seed: of the model.
        model: the trained one.
        methods: by name, `baseline` among them.
        bundles: the bundle of each method.
        scenes: to caption.
        threads: of an engine; None: its own choice.
    """
    wanted = {name: spun_captions(model, scenes.pixels, m) for name, m in methods.items()}
    places = [
        Place(seed=seed, method=name, engine=TORCH, figures=scenes.score(captions))
        for name, captions in wanted.items()
    ]
    for engine in ENGINES:
        opened = {n: load(path, engine=engine, threads=threads) for n, path in bundles.items()}
        written = _in_turns(opened, scenes.pixels)
        for name, method in methods.items():
            captions = [caption.tokens for caption in written[name]]
            place = Place(
                seed=seed,
                method=name,
                engine=engine,
                figures=scenes.score(captions),
                differences=differences(model, scenes.pixels, method, wanted[name], captions),
                rate=Spread.of([w.rate for w in written[name] if w.rate is not None]),
                ratio=None if name == BASELINE else _ratio(written[name], written[BASELINE]),
            )
            places.append(place)
    return places


def _in_turns(bundles: Mapping[str, Bundle], pixels: torch.Tensor) -> dict[str, list[Written]]:
    """Captions of every bundle, one picture after the other, so that noise meets all of them."""
    written: dict[str, list[Written]] = {name: [] for name in bundles}
    for bundle in bundles.values():
        write(bundle, pixels[0])  # the first call of an engine is slow
    for picture in pixels:
        for name, bundle in bundles.items():
            written[name].append(write(bundle, picture))
    return written


def write(bundle: Bundle, pixels: torch.Tensor) -> Written:
    """The greedy caption of one picture `[3, SIDE, SIDE]`, a step of the engine for each token."""
    seen = Seen(({PIXELS: pixels[None].numpy()},), np.zeros((1, 3), np.int64))
    session, tokens, steps = bundle.session(), list[int](), 0
    logits = session.append(prompt(1)[0].numpy(), pictures=bundle.look(seen))
    started = time.perf_counter()
    while (token := int(logits[0].argmax())) != world.EOS:
        tokens.append(token)
        if len(tokens) == NEW_TOKENS:
            break
        logits, steps = session.append([token]), steps + 1
    return Written(tokens, steps / (time.perf_counter() - started) if steps else None)


def _ratio(written: Sequence[Written], baseline: Sequence[Written]) -> Spread | None:
    pairs = zip(written, baseline, strict=True)
    return Spread.of([w.rate / b.rate for w, b in pairs if w.rate is not None and b.rate])


def differences(
    model: Model,
    pixels: torch.Tensor,
    method: Method,
    expected: Sequence[list[int]],
    found: Sequence[list[int]],
) -> tuple[Difference, ...]:
    """Where captions first differ.

    Args:
        model: whose logits say by how much.
        pixels: of the pictures, `[N, 3, SIDE, SIDE]`.
        method: that `expected` was captioned with.
        expected: the model's captions.
        found: those of a bundle.
    """
    differing = []
    for scene, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours == theirs:
            continue
        pairs = zip([*ours, world.EOS], [*theirs, world.EOS], strict=False)
        position, (mine, other) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
        logits = next_logits(model, pixels[scene], ours[:position], method)
        gap = float(logits[mine] - logits[other])
        at = Difference(scene=scene, position=position, expected=mine, found=other, gap=gap)
        differing.append(at)
    return tuple(differing)
