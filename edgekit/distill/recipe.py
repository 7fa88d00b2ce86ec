"""What a distillation does, as data: TOML files in `recipes/`, or the user's own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekit import recipes
from edgekit.errors import UsageError
from edgekit.models.config import LawcatConfig, LolcatsConfig

__all__ = ["Needles", "Recipe", "Transfer", "Tuning", "load_recipe", "recipe_names"]

PACKAGE = "edgekit.distill"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*PROJECTIONS, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Needles:
    """Synthetic retrieval mixed into the rows (`edgekit.data.needles`).

    Attributes:
        share: of all rows, 0 to 1.
        kinds: `passkey`, `niah-1`, `niah-2`, `niah-3`.
        lengths: tokens; each row draws one of them.
        depths: where needles lie, 0 (the beginning) to 1; each row draws one of them. None: evenly.
    """

    share: float = 0.0
    kinds: tuple[str, ...] = ("passkey", "niah-1")
    lengths: tuple[int, ...] = (256,)
    depths: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What both stages share.

    Attributes:
        tokens: positions to train on; 0 skips the stage.
        length: tokens per row.
        batch: rows per optimiser step, over all processes and micro-batches.
        micro_batch: rows per forward pass.
        lr: peak learning rate of AdamW; it falls to `final_lr` of itself along a cosine.
        final_lr: share of `lr` at the last step.
        warmup: share of the steps on which the rate rises linearly.
        clip: largest norm of a gradient.
        weight_decay: of AdamW.
        needles: synthetic retrieval among the rows.
    """

    tokens: int
    lr: float
    length: int = 512
    batch: int = 8
    micro_batch: int = 2
    final_lr: float = 0.0
    warmup: float = 0.01
    clip: float = 1.0
    weight_decay: float = 0.0
    needles: Needles = field(default_factory=Needles)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the field.
        """
        for name in ("length", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 1 or more")
        for name in ("tokens", "lr", "clip", "weight_decay"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 0 or more")

    @property
    def steps(self) -> int:
        """Optimiser steps that cover `tokens`."""
        return -(-self.tokens // (self.batch * self.length))


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer(Stage):
    """Stage 1: each new mixer learns its own layer's attention output (LAWCAT, section 3).

    Attributes:
        gate_lr: peak rate of the decay gate, which spikes at the rate of the rest.
        weighting: `variance` divides each layer's squared error by the variance of the teacher's
            output and clips layer by layer; `paper` is 1000 times the mean over layers, clipped as
            one.
    """

    gate_lr: float = 1e-3
    weighting: Literal["variance", "paper"] = "variance"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning(Stage):
    """Stage 2: low-rank tuning of the teacher's projections on the next token.

    Attributes:
        rank: of the LoRA pairs (arXiv 2106.09685).
        alpha: LoRA's; the delta is alpha / rank B A.
        dropout: LoRA's.
        targets: linears that are tuned, in the layers whose mixer is not softmax.
        mixer_lr: peak rate of the new mixers; 0 freezes them.
        ce_weight: of the cross-entropy with the next token.
        kl_weight: of KL(teacher || student) over the vocabulary; 0 runs no teacher.
        temperature: of that KL.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS
    mixer_lr: float = 0.0
    ce_weight: float = 1.0
    kl_weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the field.
        """
        Stage.__post_init__(self)
        unknown = [name for name in self.targets if name not in LINEARS]
        if unknown:
            raise UsageError(f"target {unknown[0]!r} given; allowed: {', '.join(LINEARS)}")
        if self.rank < 1:
            raise UsageError(f"rank {self.rank} given; allowed: 1 or more")
        if not self.ce_weight and not self.kl_weight:
            raise UsageError("ce_weight and kl_weight are both 0: nothing to learn from")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole distillation.

    Attributes:
        description: one sentence.
        mixer: registry key of the new token mixer.
        softmax_layers: layers that keep softmax attention.
        lawcat: options of the `lawcat` mixer.
        lolcats: options of the `lolcats` mixer.
        seed: of data order, needles and dropout.
        chat_loss: `assistant` learns from the assistant's turns only, `all` from every token.
        transfer: stage 1.
        tuning: stage 2.
    """

    description: str
    transfer: Transfer
    tuning: Tuning
    name: str = ""
    mixer: str = "lawcat"
    softmax_layers: tuple[int, ...] = ()
    lawcat: LawcatConfig = field(default_factory=LawcatConfig)
    lolcats: LolcatsConfig = field(default_factory=LolcatsConfig)
    seed: int = 0
    chat_loss: Literal["assistant", "all"] = "assistant"


def recipe_names() -> list[str]:
    """The recipes that ship with edgekit."""
    return recipes.recipe_names(PACKAGE)


def load_recipe(spec: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe called `spec`, or in the TOML file `spec`.

    Args:
        spec: a name of `recipe_names()`, or a path that ends in `.toml`.
        overrides: dotted keys and values that replace the file's, such as `transfer.tokens`.

    Raises:
        UsageError: for an unknown name, an unreadable file, or a key or value that is not allowed.
    """
    return recipes.load_recipe(Recipe, PACKAGE, spec, overrides)
