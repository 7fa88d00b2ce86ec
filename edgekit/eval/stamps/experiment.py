"""SPIN on the trained model: settings chosen on the validation pictures, figures on the test ones.

Every measurement is kept in a journal, so that one that was killed goes on where it was.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.config import dump
from edgekit.errors import UsageError
from edgekit.eval.chair import Chair, captioned, chair
from edgekit.eval.describing import DESCRIBE
from edgekit.eval.glyphs.methods import Control, Method
from edgekit.eval.objects import Vocabulary, read_vocabulary
from edgekit.eval.pictures import SPLITS, Annotated, read_pictures, split
from edgekit.eval.pope import pope
from edgekit.eval.stamps.methods import CONTRAST, Answers, answered
from edgekit.journal import Journal
from edgekit.models.spin import Score, SpinConfig
from edgekit.sources.picture_model import PictureModel

__all__ = ["Measuring", "measured"]

ALPHAS = (0.0, 0.08, 0.5)
SCORES: tuple[Score, ...] = ("mass", "logit")
CONTROLS: tuple[Control, ...] = ("random", "inverted")
ANSWER = 6  # tokens at most
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring:
    """What is measured.

    Attributes:
        scenes: pictures to choose on, and as many to caption; fewer where there are fewer.
        asked: pictures that POPE asks about.
        suppress: numbers of heads to try.
        tokens: of a caption at most.
        batch: pictures at a time.
        seed: of chance.
    """

    scenes: int = 150
    asked: int = 100
    suppress: tuple[int, ...] = (1, 2, 3)
    tokens: int = 48
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the field.
        """
        for name in ("scenes", "asked", "tokens", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 1 or more")


def measured(
    pictures: PictureModel,
    data: Path,
    measuring: Measuring,
    *,
    journal: Path | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Figures of a trained model, JSON-ready: by method, its settings, CHAIR, cost and POPE.

    Args:
        pictures: the model.
        data: of `edgekit.data.stamps`.
        measuring: what is measured.
        journal: where measurements are kept, to go on from; None: nowhere.
        progress: called with a step's name, its number and the count of steps.

    Raises:
        UsageError: if the data cannot be read, or the journal has other settings.
    """
    return _Measurement(pictures, data, measuring, journal, progress).run()


class _Measurement:
    """One measurement under way."""

    def __init__(
        self,
        pictures: PictureModel,
        data: Path,
        measuring: Measuring,
        journal: Path | None,
        progress: Progress,
    ) -> None:
        self._pictures, self._measuring, self._progress = pictures, measuring, progress
        self._vocabulary: Vocabulary = read_vocabulary(data / "vocabulary.txt")
        scenes = measuring.scenes
        self._validation = read_pictures(data / "validation" / "pictures.jsonl")[:scenes]
        self._test = read_pictures(data / "test" / "pictures.jsonl")[:scenes]
        layers = pictures.model.config.text_config.num_hidden_layers
        spans = (None, (0, max(layers // 2, 1)))
        self._grid = list(itertools.product(measuring.suppress, ALPHAS, spans))
        settings = {"model": pictures.source.identity["sha256"], **dump(measuring)}
        self._journal = Journal(journal, settings)
        self._number = 0
        judged = (2 + len(SCORES) + len(CONTROLS)) * (1 + len(SPLITS))
        self._count = 1 + len(SCORES) * len(self._grid) + judged

    def run(self) -> dict[str, Any]:
        plain = self._chair("validation", self._validation, Method())
        spins = {score: self._chosen(score, plain) for score in SCORES}
        seed = self._measuring.seed
        methods: dict[str, Method] = {"baseline": Method()}
        methods |= {score: Method(spin=spin) for score, spin in spins.items()}
        methods |= {c: Method(spin=spins["mass"], control=c, seed=seed) for c in CONTROLS}
        found = {name: self._judged(name, method) for name, method in methods.items()}
        found["contrast"] = self._judged("contrast", Method(seed=seed), CONTRAST)
        return found

    def _chosen(self, score: Score, plain: Mapping[str, Any]) -> SpinConfig:
        """The fewest absent objects whose F1 is at least the plain model's; else the best F1."""
        tried: list[tuple[tuple[bool, float], SpinConfig]] = []
        for suppress, alpha, layers in self._grid:
            spin = SpinConfig(suppress=suppress, alpha=alpha, layers=layers, score=score)
            name = f"validation {score} {suppress} {alpha} {layers}"
            figures = self._chair(name, self._validation, Method(spin=spin))
            fair = figures["f1"] >= plain["f1"]
            tried.append(((not fair, figures["c_i"] if fair else -figures["f1"]), spin))
        return min(tried, key=lambda pair: pair[0])[1]

    def _judged(self, name: str, method: Method, contrast: float | None = None) -> dict[str, Any]:
        """Everything about one method on the test pictures."""
        figures = self._chair(f"test {name}", self._test, method, contrast)
        asked = {kind: self._pope(name, kind, method, contrast) for kind in SPLITS}
        return {"spin": dump(method.spin), "chair": figures, "pope": asked}

    def _chair(
        self,
        name: str,
        shown: Sequence[Annotated],
        method: Method,
        contrast: float | None = None,
    ) -> dict[str, Any]:
        asked = [(DESCRIBE, picture.image) for picture in shown]

        def figures(said: Answers) -> Chair:
            pairs = zip(said.texts, shown, strict=True)
            return chair([captioned(text, p.objects, self._vocabulary) for text, p in pairs])

        return self._kept(name, asked, method, self._measuring.tokens, contrast, figures)

    def _pope(self, name: str, kind: Any, method: Method, contrast: float | None) -> dict[str, Any]:
        measuring = self._measuring
        questions = split(self._test[: measuring.asked], kind, seed=measuring.seed)
        asked = [(question.text, question.image) for question in questions]

        def figures(said: Answers) -> Any:
            truths = [question.there for question in questions]
            return pope(list(zip(said.texts, truths, strict=True)))

        return self._kept(f"pope {name} {kind}", asked, method, ANSWER, contrast, figures)

    def _kept(
        self,
        name: str,
        asked: Sequence[tuple[str, Path]],
        method: Method,
        limit: int,
        contrast: float | None,
        figures: Callable[[Answers], Any],
    ) -> dict[str, Any]:
        """A measurement and its cost, made now or before."""
        self._progress(name, self._number, self._count)
        self._number += 1
        records = {record["name"]: record["figures"] for record in self._journal.records}
        if name not in records:
            batch = self._measuring.batch
            said = answered(
                self._pictures, asked, method, limit=limit, contrast=contrast, batch=batch
            )
            cost = {"tokens": said.tokens, "seconds": said.seconds, "passes": said.passes}
            records[name] = {**dump(figures(said)), **cost}
            self._journal.append({"name": name, "figures": records[name]})
        found: dict[str, Any] = records[name]
        return found
