"""What a tuning does, as data: TOML files in `recipes/`, or the user's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgekit import recipes
from edgekit.adapters.plan import FreezePlan
from edgekit.data.tokens import ChatLoss
from edgekit.errors import UsageError

__all__ = ["LINEARS", "METHODS", "Method", "Recipe", "load_recipe", "recipe_names"]

PACKAGE = "edgekit.adapters.tune"
Method = Literal["aflora", "lora", "vera"]
METHODS: tuple[Method, ...] = ("aflora", "lora", "vera")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")  # all that may be adapted
DECODER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # AFLoRA's, for LLaMA


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole tuning.

    Attributes:
        description: one sentence.
        method: `aflora` (arXiv 2403.13269), `lora` (2106.09685) or `vera` (2310.11454).
        rank: of the adapter.
        name: of the recipe.
        alpha: the difference counts alpha / rank times; None: once.
        dropout: on the input of the adapter.
        targets: linears that are adapted, of `LINEARS`.
        layers: that are adapted; none given: all of them.
        steps: optimiser steps; 0: as many as `epochs` takes.
        epochs: passes over the data, where `steps` is 0.
        batch: rows per optimiser step.
        micro_batch: rows per forward pass.
        length: the most tokens that a row may have.
        long_rows: `refuse` stops at a longer one and names it, `drop` leaves it out and counts it.
        lr: peak rate of AdamW.
        vector_lr: peak rate of vectors (b and d of AFLoRA and VeRA); None: `lr`.
        schedule: how the rate falls after the warm-up.
        warmup: share of the steps on which it rises linearly.
        clip: largest norm of a gradient.
        weight_decay: of matrices; vectors have none.
        seed: of the adapter's first values, the order of rows, and dropout.
        chat_loss: `assistant` learns the assistant's turns only, `all` every token.
        freeze: when and in which order projections freeze, for `aflora` and `lora`; None: as the
            paper has it for `aflora`, never for the others.
        search_steps: of each trial of a search for the rate; 0: a quarter of the whole.
    """

    description: str
    method: Method
    rank: int
    name: str = ""
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = DECODER_TARGETS
    layers: tuple[int, ...] = ()
    steps: int = 0
    epochs: float = 3.0
    batch: int = 16
    micro_batch: int = 16
    length: int = 512
    long_rows: Literal["refuse", "drop"] = "refuse"
    lr: float = 1e-3
    vector_lr: float | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06
    clip: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    chat_loss: ChatLoss = "assistant"
    freeze: FreezePlan | None = None
    search_steps: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the field.
        """
        _check_targets(self.targets)
        for name in ("rank", "batch", "micro_batch", "length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 1 or more")
        for name in ("steps", "epochs", "lr", "clip", "weight_decay", "seed", "search_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 0 or more")
        if not self.steps and not self.epochs:
            raise UsageError("steps and epochs are both 0: nothing to do; give one of them")
        if self.batch % self.micro_batch:
            raise UsageError(
                f"micro_batch {self.micro_batch} given; allowed: a divisor of batch {self.batch}"
            )
        if self.alpha is not None and self.method == "vera":
            raise UsageError("alpha given for vera, which has none; leave it out")
        if self.freeze is not None and self.method == "vera":
            raise UsageError("freeze given for vera, whose projections are never trained")

    @property
    def plan(self) -> FreezePlan | None:
        """When projections freeze; None: never."""
        return FreezePlan() if self.freeze is None and self.method == "aflora" else self.freeze

    def modules(self, layers: int) -> list[str]:
        """What is adapted, as PEFT names it: full names, or only their ends where that is enough.

        Args:
            layers: of the model.

        Raises:
            UsageError: for a layer that the model lacks.
        """
        outside = [i for i in self.layers if not 0 <= i < layers]
        if outside:
            raise UsageError(f"layer {outside[0]} given; allowed: 0 to {layers - 1}")
        if not self.layers:
            return list(self.targets)
        return [
            f"model.layers.{i}.{'self_attn' if target in ATTENTION else 'mlp'}.{target}"
            for i in sorted(set(self.layers))
            for target in self.targets
        ]


def _check_targets(targets: tuple[str, ...]) -> None:
    """Refuse convolutions, gates and feature maps of a student, norms, embedding and head."""
    wrong = [name for name in targets if name not in LINEARS]
    if wrong or not targets:
        given = repr(wrong[0]) if wrong else "none"
        raise UsageError(
            f"target {given} given; allowed: {', '.join(LINEARS)}; convolutions, gates, feature "
            "maps, norms, embedding and head take no adapter"
        )


def recipe_names() -> list[str]:
    """The recipes that ship with edgekit."""
    return recipes.recipe_names(PACKAGE)


def load_recipe(spec: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe called `spec`, or in the TOML file `spec`.

    Args:
        spec: a name of `recipe_names()`, or a path that ends in `.toml`.
        overrides: dotted keys and values that replace the file's, such as `freeze.interval`.

    Raises:
        UsageError: for an unknown name, an unreadable file, or a key or value that is not allowed.
    """
    return recipes.load_recipe(Recipe, PACKAGE, spec, overrides)
