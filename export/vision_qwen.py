"""The vision side of Qwen2-VL and Qwen2.5-VL as graphs: patches in, embeddings of the language out.

Pictures may have any size. What depends on their grid of patches comes from
`runtime/images_qwen.py`, so that nothing in a graph loops over it. In OpenVINO there are two
models, with the names, inputs and outputs that openvino_genai's VLMPipeline knows; in ONNX there is
one.

P patches, E width of the tower, D of the language model, m patches along each side of a token.

OpenVINO, `openvino_vision_embeddings_model`: `hidden_states [P, pixels]` to
`last_hidden_state [P, E]`. `openvino_vision_embeddings_merger_model`: that as `hidden_states`, with
`attention_mask [1, P, P]` (added to the logits, `[1, 1, 1]` where it is the same for all) and
`rotary_pos_emb [P, angles]`, to `last_hidden_state [P / m^2, D]`. Qwen2.5-VL's also reads
`window_attention_mask [1, P, P]` and `window_index [P / m^2]`, int64. Several pictures, one after
another, are kept apart by the masks.

ONNX: `pixel_values [P, pixels]` and `rotary_pos_emb` of one picture, for Qwen2.5-VL the two of its
windows, to `last_hidden_state [P / m^2, D]`.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import nn
from torch.nn import functional

from edgekit.errors import UnsupportedError
from edgekit.export.vision import FEATURES, ONNX_OPSET, PIXELS
from edgekit.runtime.images_qwen import PatchGrid
from edgekit.runtime.vision import Seen
from edgekit.sources.quiet import quiet_transformers

__all__ = ["EMBEDDER", "FAMILIES", "MERGER", "PatchSide", "patches_to_onnx", "patches_to_openvino"]

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
EMBEDDER, MERGER = "openvino_vision_embeddings_model", "openvino_vision_embeddings_merger_model"
STATES, MASK, ANGLES = "hidden_states", "attention_mask", "rotary_pos_emb"
WINDOW_MASK, WINDOW_ORDER = "window_attention_mask", "window_index"


class PatchSide(nn.Module):
    """A tower of patches and its merger.

    Example:
        >>> features = PatchSide(model)(pixels, angles)              # doctest: +SKIP
    """

    def __init__(self, model: Any) -> None:
        """Take the vision side of a transformers model.

        Raises:
            UnsupportedError: for another family.
        """
        super().__init__()
        family = model.config.model_type
        if family not in FAMILIES:
            raise UnsupportedError(
                f"vision-language family {family!r} given; supported: {', '.join(FAMILIES)}"
            )
        self.tower, self.config = model.model.visual, model.config.to_dict()
        self.windowed = family == "qwen2_5_vl"

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patches `[P, pixels]` to `[P, E]`.

        Their convolution sees each patch once, so it is a matrix product.
        """
        return functional.linear(pixels, self.tower.patch_embed.proj.weight.flatten(1))

    def merge(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        angles: torch.Tensor,
        window_mask: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embedded patches `[P, E]` to embeddings `[P / m^2, D]`; None masks nothing."""
        if order is not None:
            x, angles = (self._ordered(y, order) for y in (x, angles))
        cos, sin = (y.repeat(1, 2)[:, None] for y in (angles.cos(), angles.sin()))
        for layer, block in enumerate(self.tower.blocks):
            whole = not self.windowed or layer in self.tower.fullatt_block_indexes
            visible = mask if whole else window_mask
            x = x + _attention(block.attn, block.norm1(x), cos, sin, visible)
            x = x + block.mlp(block.norm2(x))
        merged: torch.Tensor = self.tower.merger(x)
        return merged if order is None else merged[torch.argsort(order)]

    def _ordered(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """`x [P, width]`, its tokens in another order."""
        unit, width = self.tower.spatial_merge_size**2, x.shape[1]
        return x.reshape(-1, unit, width)[order].reshape(-1, width)

    def forward(
        self,
        pixels: torch.Tensor,
        angles: torch.Tensor,
        window_mask: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Patches `[P, pixels]` of one picture to embeddings `[P / m^2, D]`."""
        return self.merge(self.embed(pixels), None, angles, window_mask, order)

    @property
    def tokens(self) -> int | None:
        """None: a picture has as many embeddings as its size says."""
        return None

    def sample(self, random: torch.Generator) -> tuple[Seen, torch.Tensor]:
        """A picture of random patches, and its embeddings fp32 `[tokens, D]`."""
        merge = self.tower.spatial_merge_size
        grid = np.array([1, 2 * merge, 3 * merge])
        width = self.examples[PIXELS].shape[1]
        pixels = torch.randn(int(grid.prod()), width, generator=random)
        others = PatchGrid.of(self.config).inputs(grid)
        given = [others[name] for name in (ANGLES, WINDOW_MASK, WINDOW_ORDER) if name in others]
        with torch.no_grad():
            features = self(pixels, *map(torch.from_numpy, given))
        return Seen(({PIXELS: pixels.numpy(), **others},), grid[None]), features

    @property
    def examples(self) -> dict[str, torch.Tensor]:
        """Every input for a picture of two tokens by two."""
        config = self.tower.config
        unit = config.spatial_merge_size**2
        patches, sides = 4 * unit, config.temporal_patch_size * config.patch_size**2
        head = self.tower.blocks[0].attn.head_dim
        return {
            PIXELS: torch.zeros(patches, config.in_channels * sides),
            STATES: torch.zeros(patches, self.tower.patch_embed.embed_dim),
            MASK: torch.zeros(1, patches, patches),
            ANGLES: torch.zeros(patches, head // 2),
            WINDOW_MASK: torch.zeros(1, patches, patches),
            WINDOW_ORDER: torch.arange(4),
        }


def _attention(
    attention: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of `x [P, E]` to itself, with tables `[P, 1, d]` and a mask `[1, P, P]`."""
    heads = attention.qkv(x).reshape(-1, 3, attention.num_heads, attention.head_dim)
    q, k, v = heads.unbind(1)
    q, k = (y * cos + _turned(y) * sin for y in (q, k))
    q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))  # [1, H, P, d]
    visible = None if mask is None else mask[None]
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    projected: torch.Tensor = attention.proj(y[0].transpose(0, 1).flatten(1))
    return projected


def _turned(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


class _Embedder(nn.Module):
    def __init__(self, side: PatchSide) -> None:
        super().__init__()
        self.side = side

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.side.embed(hidden_states)


class _Merger(nn.Module):
    def __init__(self, side: PatchSide) -> None:
        super().__init__()
        self.side = side

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        rotary_pos_emb: torch.Tensor,
        window_attention_mask: torch.Tensor | None = None,
        window_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.side.merge(
            hidden_states, attention_mask, rotary_pos_emb, window_attention_mask, window_index
        )


def patches_to_openvino(side: PatchSide) -> dict[str, ov.Model]:
    """The vision side as OpenVINO models, by the name of their file without its ending."""
    examples = side.eval().examples
    windows = (WINDOW_MASK, WINDOW_ORDER) if side.windowed else ()
    merged = {name: examples[name] for name in (STATES, MASK, ANGLES, *windows)}
    return {
        EMBEDDER: _traced(_Embedder(side), {STATES: examples[PIXELS]}),
        MERGER: _traced(_Merger(side), merged),
    }


def _traced(module: nn.Module, examples: dict[str, torch.Tensor]) -> ov.Model:
    """The module as a model for any number of patches."""
    with torch.no_grad(), warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")  # tracing fixes widths, which are fixed anyway
        model = ov.convert_model(module, example_input=tuple(examples.values()))
    for port, (name, example) in zip(model.inputs, examples.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(ov.PartialShape(_dynamic(name, example)))
        port.get_node().set_element_type(ov.Type(example.numpy().dtype))
    model.outputs[0].get_tensor().set_names({FEATURES})
    model.validate_nodes_and_infer_types()
    return model


def _dynamic(name: str, example: torch.Tensor) -> list[int]:
    """The shape of an input; widths stay, counts of patches do not."""
    if name in (MASK, WINDOW_MASK):
        return [1, -1, -1]
    return [-1, *example.shape[1:]]


def patches_to_onnx(side: PatchSide, file: Path) -> None:
    """The vision side as one ONNX file, for one picture at a time."""
    windows = (WINDOW_MASK, WINDOW_ORDER) if side.windowed else ()
    names = (PIXELS, ANGLES, *windows)
    examples = side.eval().examples
    axes = {name: _axes(name) for name in names}
    with torch.no_grad(), warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            side,
            tuple(examples[name] for name in names),
            str(file),
            dynamo=False,
            input_names=list(names),
            output_names=[FEATURES],
            dynamic_axes={**axes, FEATURES: {0: "tokens"}},
            opset_version=ONNX_OPSET,
        )


def _axes(name: str) -> dict[int, str]:
    """Names of an input's counts."""
    if name == WINDOW_MASK:
        return {1: "patches", 2: "patches"}
    return {0: "tokens" if name == WINDOW_ORDER else "patches"}
