"""The settings of SPIN, whatever form it takes."""

from dataclasses import dataclass
from typing import Literal

from edgekit.errors import UsageError
from edgekit.kernels.head_gate.reference import Lowering, Queries

__all__ = ["Score", "SpinConfig"]

Score = Literal["mass", "logit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpinConfig:
    """Which heads are suppressed, where, and by how much.

    Attributes:
        suppress: heads to suppress in each layer.
        keep: instead, the share of heads to keep; the authors' code keeps int(keep H) of H heads,
            so 0.95 of 32 suppresses 2.
        alpha: what the output of a suppressed head is multiplied with, 0 to 1.
        layers: the first layer, and the one after the last; None: all.
        score: `mass` is the share of attention that a head spends on the image; `logit` is the sum
            of its logits there, as the authors' code has it.
        queries: `text` gates every token that is not of an image and has one before it; `last`, as
            the authors' code has it, the last position of each call, so that cutting a prompt in
            pieces changes what comes out.
        lowering: how the heads are chosen: `topk` sorts, `rank` counts and needs no such operator.
            Both give the same heads; of equal ones, the first.
        image_token_ids: tokens that stand for an image; None: what the model's config says.

    Raises:
        UsageError: for a value outside what is allowed.
    """

    suppress: int | None = None
    keep: float | None = None
    alpha: float = 0.08
    layers: tuple[int, int] | None = None
    score: Score = "mass"
    queries: Queries = "text"
    lowering: Lowering = "topk"
    image_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if (self.suppress is None) == (self.keep is None):
            raise UsageError("give suppress (a number of heads) or keep (a share), one of them")
        if self.suppress is not None and self.suppress < 0:
            raise UsageError(f"suppress {self.suppress} given; allowed: 0 or more heads")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(f"keep {self.keep} given; allowed: above 0, up to 1")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha {self.alpha} given; allowed: 0 to 1")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise UsageError(
                f"layers {self.layers} given; allowed: the first and the one after the last, "
                "such as 0 and 16"
            )
        if self.image_token_ids is not None and not self.image_token_ids:
            raise UsageError("no image_token_ids given; give one or more, or None")

    def kept(self, heads: int) -> int:
        """How many of a layer's `heads` stay as they are.

        Raises:
            UsageError: if none would.
        """
        if self.suppress is not None:
            kept = heads - self.suppress
        else:
            kept = int((self.keep or 0.0) * heads)
        if kept < 1:
            given = f"suppress {self.suppress}" if self.keep is None else f"keep {self.keep}"
            raise UsageError(f"{given} given for {heads} heads; allowed: what keeps 1 or more")
        return kept

    def inert(self, heads: int) -> bool:
        """Whether this changes nothing in a model with so many heads."""
        return self.alpha == 1 or self.kept(heads) == heads

    def chosen(self, layers: int) -> range:
        """The layers that are gated, of a model with so many.

        Raises:
            UsageError: if the range goes beyond them.
        """
        first, end = self.layers or (0, layers)
        if end > layers:
            raise UsageError(f"layers {first} to {end} given; allowed: up to {layers}")
        return range(first, end)
