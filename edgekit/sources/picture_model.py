"""A vision-language model of transformers, with pictures and text as they reach it on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgekit.bundle import VisionFacts
from edgekit.errors import SourceError, UsageError
from edgekit.runtime.images import ImageProcessor, Picture
from edgekit.runtime.images_qwen import PatchGrid, PatchProcessor
from edgekit.runtime.images_tiles import TileProcessor
from edgekit.runtime.text import Tokenizer
from edgekit.runtime.vision import Eye, PatchEye, TileEye, Vision, WholeEye
from edgekit.sources.base import Source
from edgekit.sources.quiet import quiet_transformers
from edgekit.sources.vlm import PATCHED, VISION_FAMILIES, vision_facts

__all__ = ["PictureModel", "around", "open_picture_model", "whole_model"]

# What the argument is called that is 1 on image tokens, where a model needs it.
IMAGE_TYPES = {
    "qwen2_vl": "mm_token_type_ids",
    "qwen2_5_vl": "mm_token_type_ids",
    "gemma3": "token_type_ids",
}
NESTED = ("smolvlm", "idefics3")  # take pixels as [rows, squares, 3, H, W]


@dataclass(frozen=True, slots=True)
class PictureModel:
    """The model and what makes its inputs.

    Attributes:
        source: where it comes from.
        model: of transformers, fp32, for inference.
        tokenizer: text to ids and back.
        vision: prompts and pixels.

    Example:
        >>> model = open_picture_model(open_source("llava"))            # doctest: +SKIP
        >>> model.answer("What is in the picture?", ["dog.png"])        # doctest: +SKIP
    """

    source: Source
    model: Any
    tokenizer: Tokenizer
    vision: Vision

    def prompt(self, question: str, pictures: int) -> str:
        """A question as the model was trained to be asked, with a placeholder per picture."""
        if not self.tokenizer.has_chat_template:
            return question
        messages = [{"role": "user", "content": question}]
        return self.vision.chat_prompt(self.tokenizer.chat_prompt, messages, pictures)

    def inputs(self, prompt: str, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        """Arguments of `model(...)` for one prompt.

        Args:
            prompt: with a placeholder for each picture, or with none.
            pictures: in the order of their places.
        """
        seen = self.vision.seen(pictures) if pictures else None
        grids = np.zeros((0, 3), np.int64) if seen is None else seen.grids
        text = self.vision.prompt(prompt, grids)
        ids = torch.from_numpy(self.tokenizer.encode_prompt(text))[None]
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        family = self.model.config.model_type
        if family in IMAGE_TYPES:
            found[IMAGE_TYPES[family]] = (ids == self.model.config.image_token_id).long()
        if seen is not None:
            calls = [torch.from_numpy(call["pixel_values"]) for call in seen.calls]
            pixels = torch.cat(calls)
            found["pixel_values"] = pixels[None] if family in NESTED else pixels
            if family in PATCHED:
                found["image_grid_thw"] = torch.from_numpy(grids)
        return {name: tensor.to(self.model.device) for name, tensor in found.items()}

    def answer(
        self, question: str, pictures: Sequence[Picture], *, max_new_tokens: int = 64
    ) -> str:
        """What the model says, greedily."""
        inputs = self.inputs(self.prompt(question, len(pictures)), pictures)
        written = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :].tolist())


def open_picture_model(source: Source) -> PictureModel:
    """Open the whole model of a source in PyTorch.

    Raises:
        UsageError: if the source reads no pictures.
        SourceError: if a tensor is missing or has another shape, or there is no tokenizer.
        BundleError: if its image processor has steps that are not known.
    """
    if source.vision is None:
        raise UsageError(
            f"{source.name} reads no pictures; give a vision-language model of the families "
            f"{', '.join(VISION_FAMILIES)}"
        )
    return around(source, whole_model(source))


def around(source: Source, model: Any) -> PictureModel:
    """A model of transformers with what makes its inputs.

    Args:
        source: says how pictures and prompts are read; its tensors are not.
        model: for inference.

    Raises:
        SourceError: if there is no tokenizer, or it lacks the image token.
        BundleError: if the image processor has steps that are not known.
    """
    assert source.vision is not None
    tokens = None if source.vision.family in PATCHED else _tokens(model)
    facts = vision_facts(source.vision, source.directory, tokens)
    eye = _eye(facts, source.vision.processor, model, str(source.directory))
    return PictureModel(source, model, Tokenizer(source.directory), Vision(eye, facts, _refused))


def _eye(facts: VisionFacts, settings: dict[str, Any], model: Any, where: str) -> Eye:
    if facts.tiles is not None:
        return TileEye(TileProcessor.of(settings, where=where), facts)
    if facts.tokens is not None:
        return WholeEye(ImageProcessor.of(settings, where=where), facts)
    grid = PatchGrid.of({"model_type": facts.family, **model.config.to_dict()})
    return PatchEye(PatchProcessor.of(settings, where=where), grid, facts)


def _refused(_: Any) -> Any:
    raise TypeError("the whole model looks at pictures by itself")


def whole_model(source: Source, config: Any = None) -> Any:
    """The model of transformers, fp32, for inference.

    Args:
        source: a vision-language model.
        config: instead of the source's own, such as one with fewer layers.

    Raises:
        SourceError: if a tensor is missing or has another shape.
    """
    from transformers import AutoModelForImageTextToText

    with quiet_transformers():  # it reports every tensor that a smaller config leaves out
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source.directory,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, found = loaded
    wrong = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if wrong:
        raise SourceError(
            f"{source.directory}: tensor {sorted(wrong)[0]!r} is missing or has another shape"
        )
    return model.eval()


@torch.no_grad()
def _tokens(model: Any) -> int:
    """Embeddings of one picture, or of one of its squares."""
    side = model.config.vision_config.image_size
    white = torch.ones(1, 3, side, side)  # Idefics3 leaves black pictures out
    given = white[None] if model.config.model_type in NESTED else white
    found = model.model.get_image_features(given, return_dict=True).pooler_output
    return int(found[0].shape[0])
