"""What the teacher shows in stage 1: each layer's own input, and its heads.

The mixers of any number of students can learn from one pass, since no gradient crosses a layer.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from edgekit.distill.stage import TorchBatch
from edgekit.kernels.attention_mse import attention_mse
from edgekit.mixers.base import MixerContext
from edgekit.models.decoder import Decoder, DecoderLayer, step_context

__all__ = ["View", "show_layers", "squared_error"]

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The teacher's attention in one layer.

    Attributes:
        layer: its index.
        inputs: what it reads, after the layer's first norm, `[N, T, D]`.
        heads: what it says before the output projection, `[N, T, H d]`.
        context: rotation and padding of this step.
    """

    layer: int
    inputs: torch.Tensor
    heads: torch.Tensor
    context: MixerContext


def show_layers(
    teacher: Decoder,
    layers: Sequence[int],
    batch: TorchBatch,
    autocast: Autocast,
    visit: Callable[[View], None],
) -> None:
    """Run the teacher up to the last of `layers` (rising), and show each of them to `visit`.

    A teacher whose config has SPIN shows heads that are turned down, so that what learns them needs
    no SPIN of its own.
    """
    time = batch.ids.shape[1]
    context = step_context(
        teacher.config, time, time, batch.mask, "chunked", batch.ids.device, batch.image
    )
    x = batch.embeddings
    if x is None:
        with torch.no_grad(), autocast():
            x = teacher.model.embed_tokens(batch.ids)
    for i, layer in enumerate(teacher.layers[: layers[-1] + 1]):
        with torch.no_grad(), autocast():
            inputs = layer.input_layernorm(x)
            heads, _ = layer.self_attn.mix(inputs, context)
            x = _rest(layer, x, heads) if i < layers[-1] else x
        if i in layers:
            visit(View(layer=i, inputs=inputs, heads=heads, context=context))


def squared_error(student: Decoder, view: View, autocast: Autocast) -> torch.Tensor:
    """Squared error of the student's heads in the layer of `view`, summed, an fp32 scalar."""
    with autocast():
        answer, _ = student.layers[view.layer].self_attn.mix(view.inputs, view.context)
    return attention_mse(answer, view.heads, view.context.mask)


def _rest(layer: DecoderLayer, x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """What the layer does after its heads."""
    return layer.after_mixer(x, layer.self_attn.o_proj(heads))
