"""What the training loop asks of a stage, and the batch it gives it."""

from dataclasses import dataclass
from typing import Protocol

import torch

from edgekit.data.batch import IGNORE, Batch

__all__ = ["Group", "Stage", "TorchBatch", "torch_batch"]


@dataclass(frozen=True, slots=True)
class TorchBatch:
    """Rows on the training device.

    Attributes:
        ids: int64 `[N, T]`.
        targets: int64 `[N, T]`; the token to predict at each position, or `IGNORE`.
        mask: int64 `[N, T]`, 1 for tokens, 0 for padding; None when no row is padded.
        embeddings: fp32 `[N, T, D]`, read instead of those of `ids` where pictures have theirs.
        image: which tokens belong to pictures, bool `[N, T]`; None: none.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor | None
    embeddings: torch.Tensor | None = None
    image: torch.Tensor | None = None

    @property
    def given(self) -> torch.Tensor:
        """What a decoder reads: the embeddings, or else the ids."""
        return self.ids if self.embeddings is None else self.embeddings

    @property
    def positions(self) -> int:
        """Tokens that are not padding."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def labels(self) -> int:
        """Positions with a token to predict."""
        return int((self.targets != IGNORE).sum())

    def rows(self, start: int, stop: int) -> "TorchBatch":
        """Some of the rows, without the columns at their end that are padding in all of them."""
        mask = None if self.mask is None else self.mask[start:stop]
        width = self.ids.shape[1] if mask is None else int(mask.any(dim=0).sum())

        def part(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[start:stop, :width]

        mask = None if mask is None or mask[:, :width].all() else mask[:, :width]
        ids, targets = self.ids[start:stop, :width], self.targets[start:stop, :width]
        return TorchBatch(ids, targets, mask, part(self.embeddings), part(self.image))


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Parameters that share a peak learning rate."""

    lr: float
    parameters: list[torch.nn.Parameter]


class Stage(Protocol):
    """One way to train a student.

    A stage owns its parameters and knows its loss; the loop owns time: data order, the optimiser,
    processes, checkpoints and records.
    """

    number: int
    name: str

    @property
    def parts(self) -> list[str]:
        """Names of the losses that `accumulate` returns."""
        ...

    def groups(self) -> list[Group]:
        """What is trained, at which peak rates."""
        ...

    def clipped_together(self) -> list[list[torch.nn.Parameter]]:
        """Parameters whose gradients share one norm."""
        ...

    def tensors(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name."""
        ...

    def buffers(self) -> dict[str, torch.Tensor]:
        """What was measured before the first step and must survive a restart."""
        ...

    def prepare(self, batch: TorchBatch) -> None:
        """Measure it."""
        ...

    def accumulate(self, batch: TorchBatch, whole: TorchBatch) -> torch.Tensor:
        """Add gradients of some rows of the step `whole`; returns their share of each loss."""
        ...

    def summary(self, losses: torch.Tensor) -> dict[str, object]:
        """The losses of a step as a metrics record tells them."""
        ...

    def culprit(self, batch: TorchBatch, losses: torch.Tensor) -> str:
        """Where a step whose losses or gradients are not finite went wrong."""
        ...


def torch_batch(batch: Batch, device: torch.device) -> TorchBatch:
    """`batch` on `device`."""
    mask = None if batch.mask is None else torch.from_numpy(batch.mask).long().to(device)
    ids, targets = (torch.from_numpy(a).to(device) for a in (batch.ids, batch.targets))
    return TorchBatch(ids, targets, mask)
