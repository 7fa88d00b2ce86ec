"""The vision side of a vision-language model as graphs: pixels in, embeddings of the language out.

A family says how its tower and projector are called; the libraries' own exporters trace that.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import nn

from edgekit.errors import UnsupportedError
from edgekit.runtime.vision import Seen
from edgekit.sources.quiet import quiet_transformers

__all__ = ["FAMILIES", "VisionSide", "vision_to_onnx", "vision_to_openvino"]

PIXELS, FEATURES = "pixel_values", "last_hidden_state"  # as other runtimes call them
ONNX_OPSET = 18
Call = Callable[[torch.Tensor], torch.Tensor]


class VisionSide(nn.Module):
    """A tower and its projector, for pictures of one size.

    Example:
        >>> features = VisionSide(model)(pixels)                     # doctest: +SKIP
    """

    def __init__(self, model: Any) -> None:
        """Take the vision side of a transformers model.

        Raises:
            UnsupportedError: for a family whose vision side is not known.
        """
        super().__init__()
        family = model.config.model_type
        if family not in FAMILIES:
            raise UnsupportedError(
                f"vision-language family {family!r} given; supported: {', '.join(FAMILIES)}"
            )
        self.model = model.model
        with torch.no_grad():
            self._call = FAMILIES[family](self.model)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels fp32 `[N, 3, H, W]` to embeddings fp32 `[N, tokens, D]`."""
        return self._call(pixels)

    @property
    def tokens(self) -> int | None:
        """Embeddings of one picture; None: as many as its size says."""
        with torch.no_grad():
            return int(self(self.example).shape[1])

    def sample(self, random: torch.Generator) -> tuple[Seen, torch.Tensor]:
        """A picture of random pixels, and its embeddings fp32 `[tokens, D]`."""
        pixels = torch.randn(self.example[:1].shape, generator=random)
        with torch.no_grad():
            features = self(pixels)[0]
        return Seen(({PIXELS: pixels.numpy()},), np.zeros((1, 3), np.int64)), features

    @property
    def example(self) -> torch.Tensor:
        """Pixels of two pictures, `[2, 3, H, W]`."""
        side = self.model.config.vision_config.image_size
        return torch.zeros(2, 3, side, side)


def vision_to_openvino(side: VisionSide) -> ov.Model:
    """The vision side as an OpenVINO model, for any number of pictures at once.

    Its input is `pixel_values [N, 3, H, W]`, its output `last_hidden_state [N, tokens, D]`.
    """
    with torch.no_grad(), warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")  # tracing fixes sizes that are fixed anyway
        model = ov.convert_model(side.eval(), example_input=side.example)
    model.inputs[0].get_tensor().set_names({PIXELS})
    model.outputs[0].get_tensor().set_names({FEATURES})
    model.reshape({PIXELS: [-1, *side.example.shape[1:]]})
    return model


def vision_to_onnx(side: VisionSide, file: Path) -> None:
    """The same as an ONNX file."""
    with torch.no_grad(), warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            side.eval(),
            (side.example,),
            str(file),
            dynamo=False,
            input_names=[PIXELS],
            output_names=[FEATURES],
            dynamic_axes={PIXELS: {0: "pictures"}, FEATURES: {0: "pictures"}},
            opset_version=ONNX_OPSET,
        )


def _llava(model: Any) -> Call:
    """Hidden states of one or several layers, without the class token if it is to be left out."""
    config = model.config
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    layers = config.vision_feature_layer
    chosen = [layers] if isinstance(layers, int) else layers

    def call(pixels: torch.Tensor) -> torch.Tensor:
        seen = model.vision_tower(pixels, output_hidden_states=True, return_dict=True)
        found = torch.cat([seen.hidden_states[layer][:, first:] for layer in chosen], dim=-1)
        projected: torch.Tensor = model.multi_modal_projector(found)
        return projected

    return call


def _smolvlm(model: Any) -> Call:
    """Whole pictures: what is added for positions is the same for all.

    The model's own code makes it row by row, which no tracer follows.
    """
    vision, tower = model.config.vision_config, model.vision_model
    grid = vision.image_size // vision.patch_size
    empty = torch.zeros(1, 3, vision.image_size, vision.image_size)
    whole = torch.ones(1, grid, grid, dtype=torch.bool)

    def patches(pixels: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = tower.embeddings.patch_embedding(pixels)
        return embedded.flatten(2).transpose(1, 2)

    positions = tower.embeddings(pixel_values=empty, patch_attention_mask=whole) - patches(empty)

    def call(pixels: torch.Tensor) -> torch.Tensor:
        states = patches(pixels) + positions
        states = tower.encoder(inputs_embeds=states, attention_mask=None).last_hidden_state
        joined: torch.Tensor = model.connector(tower.post_layernorm(states))
        return joined

    return call


def _gemma3(model: Any) -> Call:
    def call(pixels: torch.Tensor) -> torch.Tensor:
        states = model.vision_tower(pixel_values=pixels, return_dict=True)
        projected: torch.Tensor = model.multi_modal_projector(states.last_hidden_state)
        return projected

    return call


# Each prepares what does not depend on the pixels, and returns what is traced.
FAMILIES: dict[str, Callable[[Any], Call]] = {
    "llava": _llava,
    "smolvlm": _smolvlm,
    "idefics3": _smolvlm,
    "gemma3": _gemma3,
}
