"""The glyph world's model with LAWCAT layers: a LLaVA's eyes and edgekit's own decoder.

SPIN reads the share of a head's weight that the picture has from the indicator column of the
values, as in the exported graphs. B batch, T tokens, D channels, H heads, d width of a head.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from edgekit.kernels.head_gate.reference import SEEN
from edgekit.mixers import lawcat
from edgekit.mixers.base import MixerContext, State
from edgekit.models.config import DecoderConfig, LawcatConfig
from edgekit.models.decoder import Decoder
from edgekit.models.spin import SpinConfig
from edgekit.sources.hf_config import parse_config

__all__ = ["LawcatModel", "Ranking", "Watcher", "decoder_config", "text_tensors"]

Ranking = Callable[[torch.Tensor], torch.Tensor]  # of scores [B, T, H]
Watcher = Callable[[int, torch.Tensor], None]  # called with a layer and its scores [B, T, H]
# A half-life of 611 tokens at first: what a picture shows matters until the caption's end.
OPTIONS = LawcatConfig(gate_bias_init=4.0)
TENSORS = "model.safetensors"


class LawcatModel(nn.Module):
    """A vision-language model whose decoder has LAWCAT layers.

    Example:
        >>> model = LawcatModel(llava)                                  # doctest: +SKIP
        >>> model(input_ids=ids, pixel_values=pixels).logits            # doctest: +SKIP
        >>> with model.turned_down(SpinConfig(suppress=1)):             # doctest: +SKIP
        ...     model.continued(ids, pixels, 16)
    """

    def __init__(self, llava: Any) -> None:
        """Take a LLaVA's eyes, and make an untrained decoder as wide and deep as its own."""
        super().__init__()
        self.eyes, self.projector = llava.model.vision_tower, llava.model.multi_modal_projector
        self.image_token = llava.config.image_token_index
        self.text = Decoder(decoder_config(llava.config.text_config, "lawcat"))
        for number, layer in enumerate(self.text.layers):
            layer.self_attn = _Mixer(self.text.config)
            fresh = layer.self_attn.fresh_tensors(self.text.config, number)
            layer.self_attn.load_state_dict(fresh, strict=False)

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None
    ) -> CausalLMOutput:
        """Logits `[B, T, V]` of tokens `[B, T]`, among them those that stand for pictures."""
        return CausalLMOutput(logits=self._read(input_ids, pixel_values)[0])  # type: ignore[arg-type]

    def continued(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, count: int
    ) -> torch.Tensor:
        """The tokens `[B, T]` and `count` likeliest ones after them, one step each."""
        logits, state = self._read(input_ids, pixel_values)
        for _ in range(count):
            chosen = logits[:, -1:].argmax(dim=-1)
            input_ids = torch.cat((input_ids, chosen), dim=1)
            logits, state = self.text(chosen, state=state)
        return input_ids

    @contextlib.contextmanager
    def turned_down(
        self, spin: SpinConfig, ranking: Ranking | None = None, watcher: Watcher | None = None
    ) -> Iterator[None]:
        """SPIN while the context lasts.

        Args:
            spin: its settings.
            ranking: what the heads are ranked by, out of their scores; positive. None: the scores.
            watcher: is shown the scores.
        """
        mixers = self._mixers()
        for layer in spin.chosen(len(mixers)):
            mixers[layer].spin, mixers[layer].ranking = spin, ranking
            mixers[layer].watcher = None if watcher is None else partial(watcher, layer)
        try:
            yield
        finally:
            for mixer in mixers:
                mixer.spin = mixer.ranking = mixer.watcher = None

    @torch.no_grad()
    def fold_static(self, heads: Mapping[int, Sequence[int]], alpha: float) -> None:
        """As `edgekit.spin.static.fold_static`."""
        mixers = self._mixers()
        for layer, chosen in heads.items():
            weight = mixers[layer].o_proj.weight
            weight.view(len(weight), self.text.config.num_heads, -1)[:, list(chosen)] *= alpha

    def save_pretrained(self, folder: Path) -> None:
        """Write the tensors into a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / TENSORS))

    def restored(self, folder: Path) -> "LawcatModel":
        """This model with the tensors that `save_pretrained` wrote."""
        load_model(self, folder / TENSORS)
        return self.eval()

    def embedded(self, ids: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
        """What the decoder reads of tokens `[B, T]`, `[B, T, D]`; pictures `[B, 3, side, side]`."""
        given = self.text.model.embed_tokens(ids)
        if pixels is None:
            return cast(torch.Tensor, given)
        seen = self.eyes(pixels, output_hidden_states=True).hidden_states[-1]
        image = (ids == self.image_token)[..., None]
        return cast(torch.Tensor, given.masked_scatter(image, self.projector(seen)))

    def _read(
        self, ids: torch.Tensor, pixels: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[State]]:
        image = None if pixels is None else ids == self.image_token
        found = self.text(self.embedded(ids, pixels), image=image)
        return cast("tuple[torch.Tensor, list[State]]", found)

    def _mixers(self) -> list["_Mixer"]:
        return [cast(_Mixer, layer.self_attn) for layer in self.text.layers]


class _Mixer(lawcat.Mixer):
    """LAWCAT whose heads' scores can be watched, and replaced by others for controls."""

    ranking: Ranking | None = None
    watcher: Callable[[torch.Tensor], None] | None = None

    def gated(
        self,
        y: torch.Tensor,
        context: MixerContext,
        looks: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The heads, turned down by other scores in the column of their mass."""
        if self.spin is None or looks is not None:
            return super().gated(y, context, looks)
        mass = y[..., -1]  # [B, T, H]
        if self.watcher is not None:
            self.watcher(mass)
        if self.ranking is not None:
            sees = mass.sum(dim=-1, keepdim=True) > SEEN
            ranked = torch.where(sees, self.ranking(mass), 0.0)
            y = torch.cat((y[..., :-1], ranked[..., None]), dim=-1)
        return super().gated(y, context, looks)


def decoder_config(text: Any, mixer: str) -> DecoderConfig:
    """The decoder of a LLaVA's `text_config` with layers of one kind."""
    config, _ = parse_config(text.to_dict(), {})
    return replace(config.with_mixers((mixer,) * config.num_layers, OPTIONS), tied_head=False)


def text_tensors(llava: Any) -> dict[str, torch.Tensor]:
    """A LLaVA's decoder by edgekit's names."""
    inside = llava.model.language_model.state_dict()
    head = {"lm_head.weight": llava.lm_head.weight.detach()}
    return {f"model.{name}": tensor for name, tensor in inside.items()} | head
