"""Several first stages at once: the teacher runs once, and every student learns from it.

Stage 1 is forced by the teacher and its layers are independent, so students of different mixers can
share rows, order and the teacher's pass, and still learn exactly what each would learn alone.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch.nn.utils import get_total_norm

from edgekit.distill.stage import Group, TorchBatch
from edgekit.distill.teaching import View, show_layers
from edgekit.distill.transfer import TransferStage
from edgekit.models.decoder import Decoder

__all__ = ["Lockstep"]


class Lockstep:
    """Attention transfer to several students; see `distill.stage.Stage` for what the loop asks.

    A student whose loss or gradient is not finite stops learning; the others go on.

    Attributes:
        seconds: forward and backward passes of each student's own mixers, fp64 `[students]`.
        diverged: which students stopped, bool `[students]`.
    """

    number, name = TransferStage.number, TransferStage.name

    def __init__(
        self,
        teacher: Decoder,
        stages: Mapping[str, TransferStage],
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Join `stages`.

        Args:
            teacher: of them all.
            stages: by the student's name; all learn the same layers.
            autocast: enters the precision of matrix products.
        """
        self._teacher, self._stages, self._autocast = teacher, dict(stages), autocast
        self._layers = next(iter(stages.values())).layers
        self.seconds = torch.zeros(len(stages), dtype=torch.float64)
        self.diverged = torch.zeros(len(stages), dtype=torch.bool)

    @property
    def parts(self) -> list[str]:
        """What the losses of `accumulate` belong to: the layers of each student."""
        return [f"{name}, {part}" for name, stage in self._stages.items() for part in stage.parts]

    def groups(self) -> list[Group]:
        """Those of every student."""
        return [group for stage in self._stages.values() for group in stage.groups()]

    def clipped_together(self) -> list[list[torch.nn.Parameter]]:
        """What each student that still learns clips together."""
        learning = [stage for name, stage in self._stages.items() if not self._lost(name)]
        stages = learning or list(self._stages.values())
        return [together for stage in stages for together in stage.clipped_together()]

    def tensors(self) -> dict[str, torch.nn.Parameter]:
        """Everything that is trained: `STUDENT.NAME`."""
        return {
            f"{name}.{key}": parameter
            for name, stage in self._stages.items()
            for key, parameter in stage.tensors().items()
        }

    def buffers(self) -> dict[str, torch.Tensor]:
        """Each student's buffers, and what this stage knows of all of them."""
        found = {
            f"{name}.{key}": buffer
            for name, stage in self._stages.items()
            for key, buffer in stage.buffers().items()
        }
        return found | {"seconds": self.seconds, "diverged": self.diverged}

    def prepare(self, batch: TorchBatch) -> None:
        """Measure the teacher once for all."""
        first, *others = self._stages.values()
        first.prepare(batch)
        for stage in others:
            for name, buffer in stage.buffers().items():
                buffer.copy_(first.buffers()[name])

    def accumulate(self, batch: TorchBatch, whole: TorchBatch) -> torch.Tensor:
        """Add the gradients of `batch`'s share of every student's loss.

        Returns:
            This share of the normalised loss, fp32 `[students * layers]`; 0 for a student that
            stopped, not a number when all have.
        """
        losses = torch.zeros(len(self._stages), len(self._layers))

        def visit(view: View) -> None:
            column = self._layers.index(view.layer)
            for row, (name, stage) in enumerate(self._stages.items()):
                if self._lost(name):
                    continue
                started = time.perf_counter()
                losses[row, column] = stage.learn(view, whole.positions)
                self.seconds[row] += time.perf_counter() - started

        show_layers(self._teacher, self._layers, batch, self._autocast, visit)
        for row, stage in enumerate(self._stages.values()):
            if self.diverged[row] or not (losses[row].isfinite().all() and _finite(stage)):
                self._stop(row, stage)
                losses[row] = 0.0
        return losses.flatten() if not self.diverged.all() else losses.flatten() * torch.nan

    def summary(self, losses: torch.Tensor) -> dict[str, object]:
        """The mean loss of the students that learn, and of each one."""
        means = losses.view(len(self._stages), -1).mean(dim=1)
        told = {
            name: None if self._lost(name) else round(mean, 6)
            for name, mean in zip(self._stages, means.tolist(), strict=True)
        }
        return {"loss": means[~self.diverged].mean().item(), "students": told}

    def culprit(self, batch: TorchBatch, losses: torch.Tensor) -> str:
        """Reached only when no student is left."""
        del batch, losses
        return "every student"

    def _lost(self, name: str) -> bool:
        return bool(self.diverged[list(self._stages).index(name)])

    def _stop(self, row: int, stage: TransferStage) -> None:
        self.diverged[row] = True
        for parameter in stage.tensors().values():
            parameter.grad = None  # AdamW then leaves it alone


def _finite(stage: TransferStage) -> bool:
    grads = [p.grad for p in stage.tensors().values() if p.grad is not None]
    return bool(get_total_norm(grads).isfinite())
