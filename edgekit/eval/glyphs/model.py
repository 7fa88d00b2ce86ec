"""The models of the glyph world, a small LLaVA or one with LAWCAT layers, and their training.

First the captions alone teach what usually goes together, then pictures join them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaConfig, LlavaForConditionalGeneration

from edgekit.errors import UsageError
from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.lawcat import LawcatModel

__all__ = [
    "MODEL",
    "Lesson",
    "Mixer",
    "Model",
    "Training",
    "load_model",
    "new_model",
    "prompt",
    "rate",
    "train",
]

Mixer = Literal["softmax", "lawcat"]
Model = Any  # LlavaForConditionalGeneration, whose types refuse what it takes, or LawcatModel
Progress = Callable[[str, int, int], None]
IGNORE = -100
MODEL = "model"  # what training leaves in the folder of a seed
WIDTH, HEADS = 64, 8
PEAK, FLOOR, WARMUP, CLIP = 2e-3, 0.02, 50, 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a model learns.

    Attributes:
        text_steps: steps on captions alone.
        picture_steps: steps on pictures and captions.
        batch: fresh scenes of each step.
        seed: of weights and scenes.
    """

    text_steps: int = 400
    picture_steps: int = 1000
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the field.
        """
        for name in ("text_steps", "picture_steps", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 0 or more")
        if self.batch < 1:
            raise UsageError(f"batch {self.batch} given; allowed: 1 or more")


def new_model(seed: int, mixer: Mixer = "softmax") -> Model:
    """An untrained model: one vision block, three decoder layers of 64 channels and 8 heads.

    Args:
        seed: of the weights.
        mixer: of the decoder's layers; `softmax` is a LLaVA of transformers, `lawcat` has its eyes
            and edgekit's own decoder.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        llava = LlavaForConditionalGeneration(_config())
        _initialise(llava)
        return llava if mixer == "softmax" else LawcatModel(llava)


def load_model(folder: Path, mixer: Mixer) -> Model:
    """A trained model, as its `save_pretrained` left it."""
    if mixer == "softmax":
        llava: Model = LlavaForConditionalGeneration.from_pretrained(folder)
        return llava.eval()
    return new_model(0, mixer).restored(folder)


def _config() -> LlavaConfig:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS}
    vision = {
        **sizes,
        "model_type": "siglip_vision_model",  # no class token, and no norm that makes noise loud
        "intermediate_size": 192,
        "num_hidden_layers": 1,
        "image_size": world.SIDE,
        "patch_size": world.CELL,
        "vision_use_head": False,
    }
    text = {
        **sizes,
        "model_type": "llama",
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_key_value_heads": HEADS,
        "vocab_size": world.VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": world.BOS,
        "eos_token_id": world.EOS,
        "pad_token_id": world.EOS,
    }
    values: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": world.IMAGE,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "pad_token_id": world.EOS,
        "tie_word_embeddings": False,
    }
    return LlavaConfig(**values)


def _initialise(llava: Model) -> None:
    """PyTorch's own scales: with transformers' 0.02, which is for wide layers, it learns slowly."""
    for module in llava.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            module.reset_parameters()
    positions = llava.model.vision_tower.vision_model.embeddings.position_embedding
    nn.init.normal_(positions.weight, std=0.02)


def prompt(count: int) -> torch.Tensor:
    """What a caption begins with, for so many pictures: `[count, PATCHES + 2]`."""
    row = [world.IMAGE] * world.PATCHES + [world.BOS, world.WITH]
    return torch.tensor([row] * count)


@dataclass(frozen=True, slots=True)
class Lesson:
    """Fresh scenes and their captions.

    Attributes:
        given: what a model is called with.
        targets: the token after each of a caption's but the last, `[N, CAPTION - 1]`; `IGNORE` for
            those that every caption has or that are padding.
    """

    given: dict[str, torch.Tensor]
    targets: torch.Tensor

    @classmethod
    def drawn(cls, rng: np.random.Generator, batch: int, *, pictures: bool) -> "Lesson":
        """Scenes as a model learns from, with pictures before the captions or without."""
        scenes = [world.draw_scene(rng, world.LIKELY) for _ in range(batch)]
        captions = torch.tensor([world.caption(scene.mentioned) for scene in scenes])
        given = {"input_ids": captions}
        if pictures:
            patches = prompt(batch)[:, : world.PATCHES]
            pixels = [world.picture(rng, scene.drawn) for scene in scenes]
            given = {
                "input_ids": torch.cat((patches, captions), dim=1),
                "pixel_values": torch.from_numpy(np.stack(pixels)),
            }
        targets = captions[:, 1:]
        padding = ((targets == world.EOS).cumsum(dim=1) > 1) | (targets == world.WITH)
        return cls(given, targets.masked_fill(padding, IGNORE))


def train(model: Model, training: Training, progress: Progress | None = None) -> list[float]:
    """Teach the model both stages; returns the loss of every step."""
    rng = np.random.default_rng([training.seed, 1])
    losses = []
    for stage, steps in (("captions", training.text_steps), ("pictures", training.picture_steps)):
        optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate(steps))
        model.train()
        for step in range(steps):
            if progress is not None and not step % 50:
                progress(stage, step, steps)
            loss = _loss(model, rng, training.batch, pictures=stage == "pictures")
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
    model.eval()
    return losses


def rate(steps: int) -> Callable[[int], float]:
    """The share of the peak rate at a step: a rise, then a cosine with a floor."""

    def share(step: int) -> float:
        fall = 0.5 * (1 + np.cos(np.pi * step / max(steps, 1)))
        return float(min(1.0, (step + 1) / WARMUP) * (fall + FLOOR))

    return share


def _loss(model: Model, rng: np.random.Generator, batch: int, *, pictures: bool) -> torch.Tensor:
    """Mean cross-entropy of the captions of fresh scenes."""
    lesson = Lesson.drawn(rng, batch, pictures=pictures)
    logits = model(**lesson.given).logits[:, -world.CAPTION : -1]
    return functional.cross_entropy(
        logits.flatten(0, 1), lesson.targets.flatten(), ignore_index=IGNORE
    )
