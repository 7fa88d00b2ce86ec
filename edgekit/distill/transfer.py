"""Stage 1: every new mixer learns the attention output of its own layer (LAWCAT, arXiv 2509.18467).

The teacher runs once. Each layer's mixer reads the teacher's own input to that layer and is asked
for the teacher's heads before the output projection, so the layers learn independently, and no
gradient crosses a layer.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from edgekit.distill.recipe import Transfer
from edgekit.distill.stage import Group, TorchBatch
from edgekit.distill.teaching import View, show_layers, squared_error
from edgekit.models.decoder import Decoder

__all__ = ["TransferStage"]

GATE = "gate_"
PAPER_FACTOR = 1000.0


class TransferStage:
    """Attention-output transfer; see `distill.stage.Stage` for what the loop asks of it.

    Attributes:
        layers: that are learned, rising.
    """

    number, name = 1, "transfer"

    def __init__(
        self,
        teacher: Decoder,
        student: Decoder,
        config: Transfer,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Freeze everything but the student's new mixer tensors.

        Args:
            teacher: its mixers are all softmax.
            student: shares the teacher's frozen tensors.
            config: rates and weighting.
            autocast: enters the precision of matrix products.
        """
        self._teacher, self._student, self._config = teacher, student, config
        self._autocast = autocast
        self.layers = [i for i, m in enumerate(student.config.mixers) if m != "softmax"]
        self._new = {i: new_parameters(student, i) for i in self.layers}
        student.requires_grad_(False)
        for parameters in self._new.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self._variance = torch.zeros(len(self.layers))

    @property
    def parts(self) -> list[str]:
        """What the losses of `accumulate` belong to: the layers."""
        return [f"layer {i}" for i in self.layers]

    def groups(self) -> list[Group]:
        """The gates, which spike at the rate of the rest, and everything else."""
        gates: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for parameters in self._new.values():
            for name, parameter in parameters.items():
                (gates if GATE in name else others).append(parameter)
        found = [Group(lr=self._config.lr, parameters=others)]
        return [*found, Group(lr=self._config.gate_lr, parameters=gates)] if gates else found

    def clipped_together(self) -> list[list[torch.nn.Parameter]]:
        """Layer by layer, so that a spike in one does not slow the others; or all as one."""
        layers = [list(parameters.values()) for parameters in self._new.values()]
        return layers if self._config.weighting == "variance" else [list(self.tensors().values())]

    def tensors(self) -> dict[str, torch.nn.Parameter]:
        """Everything that is trained, by its name in the decoder."""
        return {name: p for parameters in self._new.values() for name, p in parameters.items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        """The teacher's output variance of each layer, measured once."""
        return {"variance": self._variance}

    def prepare(self, batch: TorchBatch) -> None:
        """Measure the variance of the teacher's heads in each layer on `batch`."""
        variances: list[torch.Tensor] = []

        def measure(view: View) -> None:
            valid = view.heads if batch.mask is None else view.heads[batch.mask.bool()]
            variances.append(valid.float().var())

        show_layers(self._teacher, self.layers, batch, self._autocast, measure)
        self._variance.copy_(torch.stack(variances).cpu())

    def accumulate(self, batch: TorchBatch, whole: TorchBatch) -> torch.Tensor:
        """Add the gradients of `batch`'s share of the loss.

        Args:
            batch: some rows of a step.
            whole: the step, over all processes and micro-batches.

        Returns:
            This share of each layer's normalised loss, fp32 `[layers]`, to be summed.
        """
        losses: dict[int, torch.Tensor] = {}

        def visit(view: View) -> None:
            losses[view.layer] = self.learn(view, whole.positions)

        show_layers(self._teacher, self.layers, batch, self._autocast, visit)
        return torch.stack([losses[layer] for layer in self.layers]).cpu()  # one wait for all

    def learn(self, view: View, positions: int) -> torch.Tensor:
        """Add one layer's gradients.

        Args:
            view: what the teacher shows of the layer, for some rows of a step.
            positions: tokens of the whole step.

        Returns:
            This share of the layer's normalised loss, fp32, without a dimension, where `view` is.
        """
        index = self.layers.index(view.layer)
        error = squared_error(self._student, view, self._autocast)
        count, variance = positions * view.heads.shape[-1], self._variance[index]
        paper = PAPER_FACTOR / (len(self.layers) * count)
        weight = paper if self._config.weighting == "paper" else 1.0 / (count * variance.item())
        (error * weight).backward()  # type: ignore[no-untyped-call]
        return error.detach() / count / variance

    def summary(self, losses: torch.Tensor) -> dict[str, object]:
        """What a metrics record says of a step's summed losses."""
        return {"loss": losses.mean().item(), "layers": [round(x, 6) for x in losses.tolist()]}

    def culprit(self, batch: TorchBatch, losses: torch.Tensor) -> str:
        """The first layer whose loss is not finite, else whose gradient is not."""
        del batch
        for index, (name, part) in enumerate(zip(self.parts, losses, strict=True)):
            grads = (p.grad for p in self._new[self.layers[index]].values())
            if not part.isfinite() or any(g is not None and not g.isfinite().all() for g in grads):
                return name
        return "no single layer"


def new_parameters(student: Decoder, layer: int) -> dict[str, torch.nn.Parameter]:
    """The tensors of `layer`'s mixer that the teacher lacks, by their names in the decoder."""
    mixer = student.layers[layer].self_attn
    names = type(mixer).fresh_tensors(student.config, layer)
    return {f"model.layers.{layer}.self_attn.{n}": mixer.get_parameter(n) for n in names}
