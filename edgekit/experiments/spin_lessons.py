"""SPIN learnt instead of computed: students of a glyph model that has SPIN on.

Stage 1 is `distill.transfer`'s: each LAWCAT layer learns its teacher's heads, which SPIN has turned
down or has not. Stage 2 tunes the whole decoder on the teacher's next tokens; a student that keeps
softmax has that stage alone. Nothing is turned down when a student of the first kind captions.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from edgekit.distill.recipe import Transfer
from edgekit.distill.stage import TorchBatch
from edgekit.distill.transfer import TransferStage
from edgekit.errors import UsageError
from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.lawcat import LawcatModel, decoder_config, text_tensors
from edgekit.eval.glyphs.methods import Method, turned_down
from edgekit.eval.glyphs.model import CLIP, IGNORE, Lesson, Mixer, Model, rate
from edgekit.models.decoder import Decoder
from edgekit.models.spin import SpinConfig

__all__ = ["Distilling", "captions", "distilled", "teacher_decoder"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilling:
    """How a student learns.

    Attributes:
        transfer_steps: of stage 1, for layers that are not softmax.
        tuning_steps: of stage 2.
        batch: fresh scenes of each step.
        transfer_rate: peak rate of stage 1, whose gates learn at a tenth of it.
        tuning_rate: peak rate of stage 2.
        seed: of the scenes.
    """

    transfer_steps: int = 400
    tuning_steps: int = 400
    batch: int = 64
    transfer_rate: float = 1e-2
    tuning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the field.
        """
        for name in ("transfer_steps", "tuning_steps", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 0 or more")
        if self.batch < 1:
            raise UsageError(f"batch {self.batch} given; allowed: 1 or more")


def distilled(
    llava: Model,
    mixer: Mixer,
    spin: SpinConfig | None,
    settings: Distilling,
    progress: Progress | None = None,
) -> Model:
    """A student of a trained model.

    Args:
        llava: the teacher, which stays as it is.
        mixer: of the student's layers.
        spin: what turns the teacher's heads down; None: nothing.
        settings: how it learns.
        progress: called with a stage's name, its step and the count of its steps.
    """
    rng = np.random.default_rng([settings.seed, 2])
    student = copy.deepcopy(llava)
    if mixer == "lawcat":
        student = LawcatModel(student)
        student.text.load_state_dict(text_tensors(llava), strict=False)
        _transfer(teacher_decoder(llava, spin), student, settings, rng, progress)
    _tune(llava, student, Method(spin=spin), settings, rng, progress)
    return student.eval()


def teacher_decoder(llava: Model, spin: SpinConfig | None) -> Decoder:
    """The teacher as the stages of `edgekit.distill` know one."""
    config = replace(decoder_config(llava.config.text_config, "softmax"), spin=spin)
    decoder = Decoder(config)
    decoder.load_state_dict(text_tensors(llava))
    return decoder.requires_grad_(False).eval()


def _transfer(
    teacher: Decoder,
    student: LawcatModel,
    settings: Distilling,
    rng: np.random.Generator,
    progress: Progress | None,
) -> None:
    peak = settings.transfer_rate
    config = Transfer(tokens=0, lr=peak, gate_lr=peak / 10)
    stage = TransferStage(teacher, student.text, config, contextlib.nullcontext)
    groups = [{"params": group.parameters, "lr": group.lr} for group in stage.groups()]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate(settings.transfer_steps))
    for step in range(settings.transfer_steps):
        _tell(progress, "transfer", step, settings.transfer_steps)
        batch = _batch(student, Lesson.drawn(rng, settings.batch, pictures=True))
        if not step:
            stage.prepare(batch)
        stage.accumulate(batch, batch)
        for parameters in stage.clipped_together():
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


@torch.no_grad()
def _batch(student: LawcatModel, lesson: Lesson) -> TorchBatch:
    ids = lesson.given["input_ids"]
    return TorchBatch(
        ids=ids,
        targets=torch.full_like(ids, IGNORE),
        mask=None,
        embeddings=student.embedded(ids, lesson.given["pixel_values"]),
        image=ids == world.IMAGE,
    )


def _tune(
    llava: Model,
    student: Model,
    method: Method,
    settings: Distilling,
    rng: np.random.Generator,
    progress: Progress | None,
) -> None:
    decoder = student.text if isinstance(student, LawcatModel) else student.model.language_model
    student.requires_grad_(False)
    decoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=settings.tuning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate(settings.tuning_steps))
    for step in range(settings.tuning_steps):
        _tell(progress, "tuning", step, settings.tuning_steps)
        lesson = Lesson.drawn(rng, settings.batch, pictures=True)
        with torch.no_grad(), turned_down(llava, method):
            expected = captions(llava, lesson)
        loss = functional.kl_div(
            captions(student, lesson), expected, log_target=True, reduction="batchmean"
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def captions(model: Model, lesson: Lesson) -> torch.Tensor:
    """Log probabilities `[N, V]` wherever a caption goes on."""
    logits = model(**lesson.given).logits[:, -world.CAPTION : -1]
    return functional.log_softmax(logits[lesson.targets != IGNORE], dim=-1)


def _tell(progress: Progress | None, name: str, step: int, count: int) -> None:
    if progress is not None and not step % 50:
        progress(name, step, count)
