"""A LLaVA out of a language model as it is and untrained eyes, and its directory on disk."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from edgekit.data.stamp_scenes import SIDE
from edgekit.errors import UsageError
from edgekit.runtime.images import PROCESSOR
from edgekit.runtime.text import Tokenizer
from edgekit.sources import Source
from edgekit.sources.base import VisionSource
from edgekit.sources.picture_model import PictureModel, around
from edgekit.sources.quiet import quiet_transformers

__all__ = [
    "IMAGE_TOKEN",
    "TOKENS",
    "assemble",
    "begin_with_words",
    "prompt_ids",
    "trained",
    "word_embeddings",
    "write_model",
]

IMAGE_TOKEN = "<filename>"  # of SmolLM2's vocabulary, which its chats never use
PATCH = 16
TOKENS = (SIDE // PATCH) ** 2  # of a picture
EYES: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": PATCH,
    "vision_use_head": False,
}
PROCESSING: Mapping[str, Any] = {
    "image_processor_type": "SiglipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
OF_WEIGHTS = ("config.json", "generation_config.json", "model.safetensors.index.json")


def assemble(text: Source, seed: int) -> PictureModel:
    """A language model with untrained eyes, in fp32.

    Args:
        text: a language model whose tokenizer has `IMAGE_TOKEN`.
        seed: of the eyes' weights.

    Raises:
        UsageError: if it reads pictures already, or lacks the token.
    """
    if text.vision is not None:
        raise UsageError(f"{text.name} reads pictures already; give a language model")
    tokenizer = Tokenizer(text.directory)
    image = tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False).tolist()
    if len(image) != 1:
        raise UsageError(
            f"{text.name} has no token {IMAGE_TOKEN}; give a model of SmolLM2's family"
        )
    vision = VisionSource(family="llava", image_token_id=image[0], processor=dict(PROCESSING))
    return around(replace(text, vision=vision), _llava(text, image[0], seed))


def _llava(text: Source, image: int, seed: int) -> Any:
    """The model, its language side frozen."""
    with quiet_transformers():
        language: Any = AutoModelForCausalLM.from_pretrained(
            text.directory, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    values: dict[str, Any] = {
        "vision_config": dict(EYES),
        "text_config": language.config.to_dict(),
        "image_token_index": image,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "pad_token_id": language.config.pad_token_id,
        "tie_word_embeddings": language.config.tie_word_embeddings,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava: Any = LlavaForConditionalGeneration(LlavaConfig(**values))
    llava.model.language_model.load_state_dict(language.model.state_dict())
    llava.lm_head.load_state_dict(language.lm_head.state_dict())
    llava.tie_weights()
    llava.generation_config = language.generation_config
    for frozen in (llava.model.language_model, llava.lm_head):
        frozen.requires_grad_(False)
    return llava.eval()


def prompt_ids(pictures: PictureModel, question: str) -> list[int]:
    """Tokens of a question about one picture, image tokens among them, as on a device."""
    text = pictures.vision.prompt(pictures.prompt(question, 1), np.zeros((1, 3), np.int64))
    return [int(token) for token in pictures.tokenizer.encode_prompt(text)]


def write_model(pictures: PictureModel, folder: Path) -> None:
    """Write a directory that transformers opens and `edgekit convert` reads, whole or not."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet_transformers():
        pictures.model.save_pretrained(part)
    for path in sorted(pictures.source.directory.iterdir()):
        weights = path.suffix == ".safetensors" or path.name in OF_WEIGHTS
        if path.is_file() and not weights:
            shutil.copyfile(path, part / path.name)
    text = json.dumps(PROCESSING, indent=2)
    (part / PROCESSOR).write_text(text + "\n", encoding="utf-8")
    part.rename(folder)


def word_embeddings(pictures: PictureModel, words: Sequence[str]) -> torch.Tensor:
    """What the language model reads for each word, the mean of its tokens, fp32 `[N, D]`."""
    table = pictures.model.get_input_embeddings().weight.detach().float().cpu()
    encode = pictures.tokenizer.encode
    tokens = [encode(f" {word}", add_special_tokens=False).tolist() for word in words]
    return torch.stack([table[ids].mean(dim=0) for ids in tokens])


@torch.no_grad()
def begin_with_words(projector: Any, head: torch.nn.Linear, words: torch.Tensor) -> None:
    """Make a LLaVA's projector say a word where a layer on the eyes sees its object.

    Its first channels become the layer's logits, of which GELU leaves those above zero; each adds
    its word. The other channels say nothing yet, and can learn to.

    Args:
        projector: two linear layers with GELU between them, 192 to D to D.
        head: logits of N objects, N <= D.
        words: what to add for a logit of 1, `[N, D]`.

    Raises:
        UsageError: if there are more objects than channels.
    """
    first, second, count = projector.linear_1, projector.linear_2, len(words)
    if count > first.out_features:
        raise UsageError(
            f"{count} objects given; allowed: {first.out_features}, the projector's channels"
        )
    first.weight[:count] = head.weight
    first.bias[:count] = head.bias
    second.weight.zero_()
    second.weight[:, :count] = words.T.to(second.weight)
    second.bias.zero_()


def trained(pictures: PictureModel) -> dict[str, torch.nn.Parameter]:
    """What learns: the eyes and the projector, by name."""
    return {n: p for n, p in pictures.model.named_parameters() if p.requires_grad}
