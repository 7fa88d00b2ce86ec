"""What the model learns from: pictures composed on the fly, captions, and questions with answers.

Every batch follows from the seed, the stage and the step alone, so a run that was killed goes on
with the very same ones. B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from edgekit.data.stamp_scenes import (
    LIKELY,
    StampBook,
    article,
    caption,
    compose,
    draw_scene,
)
from edgekit.eval.describing import DESCRIBE
from edgekit.eval.pictures import QUESTION
from edgekit.eval.stamps.model import prompt_ids
from edgekit.sources.picture_model import PictureModel

__all__ = ["IGNORE", "Lesson", "Lessons", "padded"]

IGNORE = -100
NEAR = 0.5  # of the objects asked for that are not there: those of the scene's theme
ANSWERS = ("No.", "Yes.")


@dataclass(frozen=True, slots=True)
class Lesson:
    """A picture, tokens of a prompt, and tokens of what is to be said after it."""

    image: Image.Image
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Lessons:
    """Makes them."""

    def __init__(
        self, pictures: PictureModel, book: StampBook, *, seed: int, questions: float
    ) -> None:
        """Prepare.

        Args:
            pictures: the model's tokenizer and prompts.
            book: stamps to compose pictures of.
            seed: of all chance.
            questions: the share of lessons that ask whether one object is there.
        """
        self._pictures, self._book = pictures, book
        self._seed, self._questions = seed, questions
        self._prompts: dict[str, tuple[int, ...]] = {}
        end = pictures.tokenizer.special["eos_token"]
        self._end = pictures.tokenizer.encode(end, add_special_tokens=False).tolist()

    def seen(self, stage: int, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures as pixels `[count, 3, S, S]`, and which objects each shows, `[count, N]`."""
        rng = self._rng(stage, step)
        names = {name: place for place, name in enumerate(self._book.names)}
        shown = torch.zeros(count, len(names))
        images = []
        for row in range(count):
            drawn = draw_scene(rng, self._book.themes, LIKELY).drawn
            images.append(compose(rng, self._book, drawn))
            shown[row, [names[name] for name in drawn]] = 1
        return self.pixels(images), shown

    def said(self, stage: int, step: int, count: int) -> list[Lesson]:
        """Pictures with captions, or with a question and its answer; shortest first."""
        rng = self._rng(stage, step)
        lessons = [self._lesson(rng) for _ in range(count)]
        return sorted(lessons, key=lambda lesson: len(lesson.prompt) + len(lesson.answer))

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What the model sees of pictures, fp32 `[B, 3, S, S]`."""
        return torch.from_numpy(self._pictures.vision.seen(images).calls[0]["pixel_values"])

    def _rng(self, stage: int, step: int) -> np.random.Generator:
        # NumPy fills a short seed with zeros: the last number keeps these apart from test scenes.
        return np.random.default_rng([self._seed, stage, step, 1])

    def _lesson(self, rng: np.random.Generator) -> Lesson:
        themes = self._book.themes
        scene = draw_scene(rng, themes, LIKELY)
        image = compose(rng, self._book, scene.drawn)
        if rng.random() >= self._questions:
            return self._made(image, DESCRIBE, caption(scene.mentioned, themes))
        there = bool(rng.random() < 0.5)
        names = scene.mentioned if there else self._absent(rng, scene.mentioned)
        name = names[int(rng.integers(len(names)))]
        question = QUESTION.format(article=article(name), name=name)
        return self._made(image, question, ANSWERS[there])

    def _absent(self, rng: np.random.Generator, mentioned: Sequence[str]) -> Sequence[str]:
        """Objects that are not mentioned, of the same themes or of any."""
        themes = self._book.themes.values()
        near = [o for objects in themes if set(objects) & set(mentioned) for o in objects]
        chosen = near if rng.random() < NEAR else self._book.names
        return [name for name in chosen if name not in mentioned]

    def _made(self, image: Image.Image, question: str, answer: str) -> Lesson:
        if question not in self._prompts:
            self._prompts[question] = tuple(prompt_ids(self._pictures, question))
        tokens = self._pictures.tokenizer.encode(answer, add_special_tokens=False).tolist()
        return Lesson(image, self._prompts[question], (*tokens, *self._end))


def padded(lessons: Sequence[Lesson], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[B, T]`, and as targets `[B, T]` those of the answers; padded on the right."""
    rows = [lesson.prompt + lesson.answer for lesson in lessons]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width), IGNORE)
    for number, (row, lesson) in enumerate(zip(rows, lessons, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        targets[number, len(lesson.prompt) : len(row)] = torch.tensor(lesson.answer)
    return ids, targets
