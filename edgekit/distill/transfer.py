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
from edgekit.mixers.base import MixerContext
from edgekit.models.decoder import Decoder, DecoderLayer, step_context

__all__ = ["TransferStage"]

GATE = "gate_"
PAPER_FACTOR = 1000.0


class TransferStage:
    """Attention-output transfer; see `distill.stage.Stage` for what the loop asks of it."""

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
        self._layers = [i for i, m in enumerate(student.config.mixers) if m != "softmax"]
        self._new = {i: new_parameters(student, i) for i in self._layers}
        student.requires_grad_(False)
        for parameters in self._new.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self._variance = torch.zeros(len(self._layers))

    @property
    def parts(self) -> list[str]:
        """What the losses of `accumulate` belong to: the layers."""
        return [f"layer {i}" for i in self._layers]

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

        def measure(layer: int, inputs: torch.Tensor, heads: torch.Tensor, _: MixerContext) -> None:
            del layer, inputs
            valid = heads if batch.mask is None else heads[batch.mask.bool()]
            variances.append(valid.float().var())

        self._each_layer(batch, measure)
        self._variance.copy_(torch.stack(variances).cpu())

    def accumulate(self, batch: TorchBatch, whole: TorchBatch) -> torch.Tensor:
        """Add the gradients of `batch`'s share of the loss.

        Args:
            batch: some rows of a step.
            whole: the step, over all processes and micro-batches.

        Returns:
            This share of each layer's normalised loss, fp32 `[layers]`, to be summed.
        """
        losses, positions = torch.zeros(len(self._layers)), whole.positions
        weights = self._weights(positions)

        def learn(
            layer: int, inputs: torch.Tensor, heads: torch.Tensor, context: MixerContext
        ) -> None:
            error = self._error(layer, inputs, heads, context)
            index = self._layers.index(layer)
            (error * weights[index]).backward()  # type: ignore[no-untyped-call]
            losses[index] = error.detach().cpu() / (positions * heads.shape[-1])

        self._each_layer(batch, learn)
        return losses / self._variance

    def summary(self, losses: torch.Tensor) -> dict[str, object]:
        """What a metrics record says of a step's summed losses."""
        return {"loss": losses.mean().item(), "layers": [round(x, 6) for x in losses.tolist()]}

    def culprit(self, batch: TorchBatch, losses: torch.Tensor) -> str:
        """The first layer whose loss is not finite, else whose gradient is not."""
        del batch
        for index, (name, part) in enumerate(zip(self.parts, losses, strict=True)):
            grads = (p.grad for p in self._new[self._layers[index]].values())
            if not part.isfinite() or any(g is not None and not g.isfinite().all() for g in grads):
                return name
        return "no single layer"

    def _weights(self, positions: int) -> list[float]:
        """What turns a layer's summed squared error into its part of the objective."""
        config = self._student.config
        count = positions * config.num_heads * config.head_dim
        if self._config.weighting == "paper":
            return [PAPER_FACTOR / (len(self._layers) * count)] * len(self._layers)
        return [1.0 / (count * variance) for variance in self._variance.tolist()]

    def _error(
        self, layer: int, inputs: torch.Tensor, heads: torch.Tensor, context: MixerContext
    ) -> torch.Tensor:
        """Summed squared error of the student's heads in `layer`, fp32."""
        with self._autocast():
            answer, _ = self._student.layers[layer].self_attn.mix(inputs, context)
        error = (answer.float() - heads.float()).square()
        if context.mask is not None:
            error = error * context.mask[..., None]
        return error.sum()

    def _each_layer(
        self,
        batch: TorchBatch,
        visit: Callable[[int, torch.Tensor, torch.Tensor, MixerContext], None],
    ) -> None:
        """Run the teacher up to the last layer that is learned; show each one's input and heads."""
        time = batch.ids.shape[1]
        context = step_context(
            self._teacher.config, time, time, batch.mask, "chunked", batch.ids.device
        )
        with torch.no_grad(), self._autocast():
            x = self._teacher.model.embed_tokens(batch.ids)
        for i in range(self._layers[-1] + 1):
            layer = self._teacher.layers[i]
            with torch.no_grad(), self._autocast():
                inputs = layer.input_layernorm(x)
                heads, _ = layer.self_attn.mix(inputs, context)
                x = _rest(layer, x, heads) if i < self._layers[-1] else x
            if i in self._new:
                visit(i, inputs, heads, context)


def new_parameters(student: Decoder, layer: int) -> dict[str, torch.nn.Parameter]:
    """The tensors of `layer`'s mixer that the teacher lacks, by their names in the decoder."""
    mixer = student.layers[layer].self_attn
    names = type(mixer).fresh_tensors(student.config, layer)
    return {f"model.layers.{layer}.self_attn.{n}": mixer.get_parameter(n) for n in names}


def _rest(layer: DecoderLayer, x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """What the layer does after its heads."""
    x = x + layer.self_attn.o_proj(heads)
    y: torch.Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return y
