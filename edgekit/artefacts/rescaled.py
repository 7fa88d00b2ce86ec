"""`lowrank` then `vector`: W + B A with every row brought to a learned norm (DoRA)."""

from dataclasses import dataclass

import torch

from edgekit.artefacts.lowrank import LowRank
from edgekit.errors import UsageError

__all__ = ["Rescaled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescaled:
    """W' = diag(m / |W + B A|) (W + B A), norms over rows (DoRA, arXiv 2402.09353, equation 5).

    Attributes:
        pair: B A.
        magnitude: m `[out]`, any float dtype.

    Raises:
        UsageError: if the magnitude does not fit the pair or is not finite.
    """

    pair: LowRank
    magnitude: torch.Tensor

    def __post_init__(self) -> None:
        """Check what `fold` relies on."""
        if self.magnitude.shape != self.pair.b.shape[:1] or not self.magnitude.isfinite().all():
            raise UsageError(
                f"magnitude {list(self.magnitude.shape)} given; allowed: "
                f"[{self.pair.b.shape[0]}], all finite"
            )

    @property
    def bytes(self) -> int:
        """Size as it is stored."""
        return self.pair.bytes + self.magnitude.nbytes

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be folded."""
        return self.pair.fits(shape)

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """The new weight in fp32, as a new tensor.

        Args:
            weight: `[out, in]`, any float dtype.

        Raises:
            UsageError: if the weight has another shape.
        """
        moved = self.pair.fold(weight)
        norms: torch.Tensor = torch.linalg.vector_norm(moved, dim=1)
        scale: torch.Tensor = self.magnitude.float() / norms
        return moved * scale[:, None]
