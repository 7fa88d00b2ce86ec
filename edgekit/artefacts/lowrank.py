"""`lowrank`: a difference of rank r to a weight matrix, W + B A (LoRA, arXiv 2106.09685)."""

from dataclasses import dataclass

import torch

from edgekit.errors import UsageError

__all__ = ["LowRank", "unfold"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A difference B A to a weight `[out, in]`, any scale folded in.

    Attributes:
        a: `[r, in]`, any float dtype.
        b: `[out, r]`, any float dtype.

    Raises:
        UsageError: if the shapes do not fit together or a value is not finite.
    """

    a: torch.Tensor
    b: torch.Tensor

    def __post_init__(self) -> None:
        """Check what `fold` relies on."""
        shapes = f"A {list(self.a.shape)} and B {list(self.b.shape)}"
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise UsageError(f"low rank: {shapes} given; allowed: A [r, in] and B [out, r]")
        if not self.rank:
            raise UsageError(f"low rank: {shapes} given; the rank must be 1 or more")
        if not (self.a.isfinite().all() and self.b.isfinite().all()):
            raise UsageError("low rank: A or B has values that are not finite")

    @property
    def rank(self) -> int:
        """Rows of A, r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the weights that this fits."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def bytes(self) -> int:
        """Size of both matrices as they are stored."""
        return self.a.nbytes + self.b.nbytes

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be folded."""
        return shape == self.shape

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """W + B A in fp32, as a new tensor.

        Args:
            weight: `[out, in]`, any float dtype.

        Raises:
            UsageError: if the weight has another shape.
        """
        if not self.fits(tuple(weight.shape)):
            raise UsageError(
                f"low rank: a weight {list(weight.shape)} given; this fits {list(self.shape)}"
            )
        return torch.addmm(weight.float(), self.b.float(), self.a.float())


def unfold(difference: torch.Tensor, rank: int) -> tuple[LowRank, float]:
    """The nearest matrix of rank `rank`, by truncated SVD (Eckart and Young, 1936).

    Args:
        difference: `[out, in]`, any float dtype.
        rank: 1 to min(out, in).

    Returns:
        Factors in fp32 of equal norm, so that neither overflows in fp16 before the other, and the
        relative error |D - B A| / |D| in the Frobenius norm; 0 for a difference of zeros.

    Raises:
        UsageError: if the rank is outside what the shape allows or a value is not finite.
    """
    most = min(difference.shape)
    if not 1 <= rank <= most:
        raise UsageError(f"low rank: rank {rank} given; allowed: 1 to {most}")
    if not difference.isfinite().all():
        raise UsageError("low rank: the difference has values that are not finite")
    u, s, vh = torch.linalg.svd(difference.double(), full_matrices=False)
    root = s[:rank].sqrt()
    factors = LowRank(
        a=(root[:, None] * vh[:rank]).float().contiguous(),
        b=(u[:, :rank] * root).float().contiguous(),
    )
    total = s.norm()
    return factors, float(s[rank:].norm() / total) if total else 0.0
