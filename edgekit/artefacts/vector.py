"""`vector`: a scale for each row or column of a weight matrix, diag(s) W or W diag(s)."""

from dataclasses import dataclass
from typing import Literal

import torch

from edgekit.errors import UsageError

__all__ = ["Vector"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Vector:
    """Scales of a map's outputs or inputs, such as (IA)^3 learns (arXiv 2205.05638).

    Attributes:
        scale: `[out]` or `[in]`, any float dtype.
        side: `out` scales rows of the weight and the bias, `in` its columns.

    Raises:
        UsageError: if the scale is no vector or a value is not finite.
    """

    scale: torch.Tensor
    side: Literal["out", "in"]

    def __post_init__(self) -> None:
        """Check what `fold` relies on."""
        if self.scale.dim() != 1 or not self.scale.isfinite().all():
            raise UsageError(
                f"vector: a scale {list(self.scale.shape)} given; allowed: [n], all finite"
            )

    @property
    def bytes(self) -> int:
        """Size as it is stored."""
        return self.scale.nbytes

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight `[out, in]` of this shape can be scaled."""
        return len(shape) == 2 and shape[0 if self.side == "out" else 1] == len(self.scale)

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """The scaled weight in fp32, as a new tensor.

        Args:
            weight: `[out, in]`, any float dtype.

        Raises:
            UsageError: if the weight has another shape.
        """
        if not self.fits(tuple(weight.shape)):
            raise UsageError(
                f"vector: a weight {list(weight.shape)} given; this scales {len(self.scale)} "
                f"{'rows' if self.side == 'out' else 'columns'}"
            )
        scale = self.scale.float()
        return weight.float() * (scale[:, None] if self.side == "out" else scale)

    def fold_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """The map's bias `[out]` after scaling, in fp32."""
        return bias.float() * self.scale.float() if self.side == "out" else bias.float()
