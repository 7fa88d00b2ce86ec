"""Training in two stages: eyes learn to tell objects apart, then to tell the language model.

First a linear layer on the eyes says which objects a picture shows, which is quick since no
language model runs. What it learnt becomes the projector's beginning: a patch that shows an object
is read as the object's word. Then eyes and projector learn what makes the frozen model write the
captions.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional

from edgekit.config import dump
from edgekit.errors import TrainingError, UsageError
from edgekit.eval.stamps import checkpoint as checkpoints
from edgekit.eval.stamps.checkpoint import Checkpoint
from edgekit.eval.stamps.lessons import IGNORE, Lesson, Lessons, padded
from edgekit.eval.stamps.model import EYES, begin_with_words, trained, word_embeddings
from edgekit.sources.picture_model import PictureModel

__all__ = ["METRICS", "STAGES", "Training", "read_metrics", "train"]

Precision = Literal["float32", "bfloat16"]
Progress = Callable[[str, int, int], None]
METRICS = "metrics.jsonl"
STAGES = ("eyes", "words")
FLOOR, CLIP, DECAY = 0.02, 1.0, 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How the model learns.

    Attributes:
        eye_steps: steps of the first stage.
        eye_batch: pictures of each.
        steps: steps of the second stage.
        batch: lessons of each.
        micro: lessons that go through the language model at a time.
        rate: the highest learning rate of the second stage; the first has twice as much.
        warmup: steps of each stage over which it rises.
        questions: the share of lessons that ask whether one object is there.
        precision: what the models compute in; parameters are fp32.
        seed: of weights and scenes.
    """

    eye_steps: int = 3000
    eye_batch: int = 64
    steps: int = 2000
    batch: int = 16
    micro: int = 8
    rate: float = 5e-4
    warmup: int = 100
    questions: float = 0.25
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the field.
        """
        for name in ("eye_steps", "steps", "seed", "warmup"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 0 or more")
        for name in ("eye_batch", "batch", "micro"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 1 or more")
        if not 0 <= self.questions <= 1:
            raise UsageError(f"questions {self.questions} given; allowed: 0 to 1")
        if not 0 < self.rate < math.inf:
            raise UsageError(f"rate {self.rate} given; allowed: above 0")


class _Stage(Protocol):
    """One stage of a training."""

    parameters: Mapping[str, nn.Parameter]
    steps: int
    rate: float

    def backward(self, step: int) -> float:
        """Add the gradients of a step's batch; returns its loss."""

    def finish(self) -> None:
        """Leave what the next stage begins with."""


class _Eyes:
    """Cross-entropy of each object being shown, as the most telling patch has it."""

    def __init__(
        self, pictures: PictureModel, lessons: Lessons, training: Training, objects: Sequence[str]
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self._head = nn.Linear(EYES["hidden_size"], len(objects))
        self._head.to(pictures.model.device)
        self._model, self._lessons, self._training = pictures.model, lessons, training
        self._words = word_embeddings(pictures, objects)
        eyes = {n: p for n, p in trained(pictures).items() if "vision_tower" in n}
        head = {f"head.{n}": p for n, p in self._head.named_parameters()}
        self.parameters: Mapping[str, nn.Parameter] = {**eyes, **head}
        self.steps, self.rate = training.eye_steps, 2 * training.rate

    def backward(self, step: int) -> float:
        logits, shown = self._seen(step)
        loss = functional.binary_cross_entropy_with_logits(logits, shown)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def finish(self) -> None:
        """Let the projector begin as what the head knows, in words."""
        logits, shown = self._seen(self.steps)
        sure = logits[shown.bool()].mean().clamp_min(1.0)
        begin_with_words(
            self._model.model.multi_modal_projector, self._head, self._words / sure.cpu()
        )

    def _seen(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[B, N]` that the objects are shown, fp32, and whether they are."""
        pixels, shown = self._lessons.seen(0, step, self._training.eye_batch)
        device = self._model.device
        with _precision(device, self._training):
            tower = self._model.model.vision_tower
            states = tower(pixels.to(device), output_hidden_states=True).hidden_states
            logits = self._head(states[-1]).amax(dim=1)  # [B, patches, objects]
        return logits.float(), shown.to(device)


class _Words:
    """Mean cross-entropy of the answers' tokens."""

    def __init__(self, pictures: PictureModel, lessons: Lessons, training: Training) -> None:
        self._model, self._lessons, self._training = pictures.model, lessons, training
        self.parameters: Mapping[str, nn.Parameter] = trained(pictures)
        self.steps, self.rate = training.steps, training.rate

    def backward(self, step: int) -> float:
        training = self._training
        lessons = self._lessons.said(1, step, training.batch)
        count = sum(len(lesson.answer) for lesson in lessons)
        total = 0.0
        for start in range(0, len(lessons), training.micro):
            loss = self._summed(lessons[start : start + training.micro]) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def finish(self) -> None:
        """Nothing comes after it."""

    def _summed(self, lessons: list[Lesson]) -> torch.Tensor:
        model, device = self._model, self._model.device
        ids, targets = (t.to(device) for t in padded(lessons, model.config.pad_token_id or 0))
        pixels = self._lessons.pixels([lesson.image for lesson in lessons]).to(device)
        with _precision(device, self._training):
            # No mask: padding stands on the right, where a causal model sees it from nowhere else.
            states = model.model(input_ids=ids, pixel_values=pixels, use_cache=False)[0]
            wanted = targets[:, 1:] != IGNORE
            logits = model.lm_head(states[:, :-1][wanted])
        return functional.cross_entropy(logits.float(), targets[:, 1:][wanted], reduction="sum")


def _precision(device: torch.device, training: Training) -> AbstractContextManager[Any]:
    if training.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def train(
    pictures: PictureModel,
    lessons: Lessons,
    training: Training,
    folder: Path,
    *,
    objects: Sequence[str],
    save_every: float = 300.0,
    progress: Progress = lambda *_: None,
) -> None:
    """Teach the model both stages, from where the run in `folder` left off.

    Args:
        pictures: of `assemble`; its eyes and projector change.
        lessons: what it learns from.
        training: how.
        folder: of checkpoints and of `metrics.jsonl`.
        objects: names of those to tell apart; at most as many as the language model has channels.
        save_every: seconds between two checkpoints.
        progress: called with a stage, the number of a step and their count.

    Raises:
        TrainingError: if a loss is not finite, or the run in `folder` has other settings.
    """
    run = _Run(pictures, training, folder, save_every, progress)
    start = run.resumed()
    stages: list[_Stage] = [
        _Eyes(pictures, lessons, training, objects),
        _Words(pictures, lessons, training),
    ]
    for number, stage in enumerate(stages):
        if start is None or number >= start.stage:
            run.stage(number, stage, start if start and start.stage == number else None)
    pictures.model.eval()


class _Run:
    """One training under way."""

    def __init__(
        self,
        pictures: PictureModel,
        training: Training,
        folder: Path,
        save_every: float,
        progress: Progress,
    ) -> None:
        self._pictures, self._folder = pictures, folder
        self._training, self._save_every, self._progress = training, save_every, progress
        text = pictures.source.identity["sha256"]
        self._settings = {"text": text, "eyes": dict(EYES), **dump(training)}
        self._before, self._began, self._saved = 0.0, time.monotonic(), time.monotonic()

    def resumed(self) -> Checkpoint | None:
        """The last checkpoint, its parameters in the model, and no metrics beyond it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found = checkpoints.latest(self._folder, self._settings)
        _cut_metrics(self._folder / METRICS, found)
        if found is not None:
            self._before = found.seconds
            _load(trained(self._pictures), found.tensors)
        return found

    def stage(self, number: int, stage: _Stage, start: Checkpoint | None) -> None:
        """All steps of a stage that are left."""
        parameters = list(stage.parameters.values())
        optimiser = torch.optim.AdamW(parameters, lr=stage.rate, weight_decay=DECAY)
        done = 0
        if start is not None and start.optimiser is not None:
            _load(stage.parameters, start.tensors)
            optimiser.load_state_dict(start.optimiser)
            done = start.step
        for step in range(done, stage.steps):
            self._progress(STAGES[number], step, stage.steps)
            self._step(number, step, stage, optimiser)
            if time.monotonic() - self._saved >= self._save_every:
                self._save(number, step + 1, stage.parameters, optimiser.state_dict())
        stage.finish()
        self._save(number + 1, 0, {}, None)

    def _step(
        self, number: int, step: int, stage: _Stage, optimiser: torch.optim.Optimizer
    ) -> None:
        rate = stage.rate * _share(step, stage.steps, self._training.warmup)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = stage.backward(step)
        if not math.isfinite(loss):
            raise TrainingError(f"stage {STAGES[number]}, step {step}: loss {loss}; lower the rate")
        norm = nn.utils.clip_grad_norm_(stage.parameters.values(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        line = {
            "stage": number,
            "step": step,
            "loss": loss,
            "norm": float(norm),
            "rate": rate,
            "seconds": round(self._seconds, 3),
        }
        with (self._folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def _save(
        self,
        stage: int,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimiser: dict[str, Any] | None,
    ) -> None:
        found = Checkpoint(
            stage=stage,
            step=step,
            seconds=self._seconds,
            tensors={**trained(self._pictures), **parameters},
            optimiser=optimiser,
        )
        checkpoints.write(self._folder, self._settings, found)
        self._saved = time.monotonic()


def _load(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _share(step: int, steps: int, warmup: int) -> float:
    """The share of the peak rate at a step: a rise, then a cosine with a floor."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1))))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines of `metrics.jsonl`; none if there is no such file."""
    return list(_lines(path)) if path.is_file() else []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _cut_metrics(path: Path, found: Checkpoint | None) -> None:
    """Leave only steps that the checkpoint has."""
    if not path.is_file():
        return
    reached = (0, 0) if found is None else (found.stage, found.step)
    kept = [line for line in _lines(path) if (line["stage"], line["step"]) < reached]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(part, path)
