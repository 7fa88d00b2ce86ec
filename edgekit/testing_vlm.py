"""Tiny random vision-language models, one per family, for tests of SPIN and of the exporters.

All see 32x32 pixels in patches of 8, and have a decoder of 2 layers, 64 wide; none was trained.

Example:
    >>> vlm = tiny_vlm("llava")                                     # doctest: +SKIP
    >>> vlm.model(**vlm.inputs("ab<image>cd", images=1))            # doctest: +SKIP
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgekit.errors import UsageError
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import with_fresh_mixers
from edgekit.models.weights import MemoryStore, WeightStore
from edgekit.sources.hf_config import parse_config
from edgekit.sources.vlm import TextStore, text_config
from edgekit.testing import write_tiny_tokenizer

__all__ = ["TINY_VLMS", "TinyVlm", "language_of", "tiny_vlm", "write_tiny_vlm"]

IMAGE, VOCABULARY, SIDE, PATCH = 300, 320, 32, 8  # token id; tokens; pixels
PAD, BOS, EOS, VISION_START, VISION_END = 0, 1, 2, 301, 302
PATCHES = (SIDE // PATCH) ** 2
# Special tokens from `IMAGE` on; spare ones follow, up to the vocabulary's end.
MARKERS = (
    "<image>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<fake_token_around_image>",
    "<global-img>",
)
TILE_MARKERS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))
QWEN_MARKERS = ("<|image_pad|>", *MARKERS[1:3])
GEMMA_MARKERS = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROCESSOR: Mapping[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
MROPE: Mapping[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 3, 3],
}
SQUARE: Mapping[str, Any] = {
    **PROCESSOR,
    "image_processor_type": "Gemma3ImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "do_center_crop": False,
}
TILER: Mapping[str, Any] = {
    **PROCESSOR,
    "image_processor_type": "SmolVLMImageProcessor",
    "do_image_splitting": True,
    "size": {"longest_edge": 2 * SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "resample": 1,
    "do_center_crop": False,
    "do_pad": True,
}
PATCHER: Mapping[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_resize": True,
    "min_pixels": 2 * 2 * 16 * 16,
    "max_pixels": 12 * 16 * 16,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyVlm:
    """A model and what its processor would have made of a prompt.

    Attributes:
        family: of `TINY_VLMS`.
        model: in fp32, for inference.
        tokens: image tokens of one image.
        pixels: keyword arguments for the pixels of so many images, all different.
    """

    family: str
    model: Any
    tokens: int
    pixels: Callable[[int], dict[str, torch.Tensor]]

    def row(self, parts: Sequence[Sequence[int] | None]) -> list[int]:
        """Token ids: lists of text tokens, and None where an image lies."""
        image = [IMAGE] * self.tokens
        if self.family.startswith("qwen"):
            image = [VISION_START, *image, VISION_END]
        return [token for part in parts for token in (image if part is None else part)]

    def inputs(self, *rows: Sequence[Sequence[int] | None]) -> dict[str, torch.Tensor]:
        """Arguments of `model(...)` for rows of `row`, padded on the left; see `row`."""
        tokens = [self.row(parts) for parts in rows]
        length = max(map(len, tokens))
        padded = [[PAD] * (length - len(row)) + row for row in tokens]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in tokens]
        found = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
        images = [sum(part is None for part in parts) for parts in rows]
        if any(images):
            found |= self._pixels(images)
        if self.family == "gemma3":
            found["token_type_ids"] = (found["input_ids"] == IMAGE).long()
        if self.family.startswith("qwen"):
            found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).int()
        return found

    def _pixels(self, images: list[int]) -> dict[str, torch.Tensor]:
        found = self.pixels(sum(images))
        if self.family != "smolvlm":
            return found
        # Idefics3 reads [rows, images, ...]; a row with fewer images ends in black ones, which
        # it leaves out.
        pixels = found["pixel_values"]
        rows = torch.zeros(len(images), max(images), *pixels.shape[1:])
        for i, part in enumerate(torch.split(pixels, images)):
            rows[i, : len(part)] = part
        return {"pixel_values": rows}


def tiny_vlm(family: str, *, seed: int = 0) -> TinyVlm:
    """A random model of a family.

    Args:
        family: of `TINY_VLMS`.
        seed: of its weights.

    Raises:
        UsageError: for an unknown family.
    """
    if family not in TINY_VLMS:
        raise UsageError(f"family {family!r} given; allowed: {', '.join(TINY_VLMS)}")
    classes, config, tokens, pixels = TINY_VLMS[family]()
    transformers = importlib.import_module("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, classes)(config).eval()
        for parameter in model.parameters():  # the usual 0.02 leaves attention all but uniform
            if parameter.ndim > 1:
                parameter.data.mul_(4.0)
                if not parameter.data.any():  # a projection that waits for training
                    parameter.data.normal_(std=0.2)
    return TinyVlm(family=family, model=model, tokens=tokens, pixels=pixels)


def write_tiny_vlm(directory: Path, family: str, *, seed: int = 0) -> TinyVlm:
    """Write a random model as a Hugging Face checkpoint with a tokenizer and an image processor.

    Args:
        directory: made here.
        family: of `TINY_VLMS`.
        seed: of its weights.

    Returns:
        The model that was written.
    """
    vlm = tiny_vlm(family, seed=seed)
    vlm.model.save_pretrained(directory)
    markers: tuple[str, ...] = MARKERS
    mark, settings = MARKERS[0], PROCESSOR
    if family == "gemma3":
        markers, mark, settings = GEMMA_MARKERS, GEMMA_MARKERS[1], SQUARE
    if family == "smolvlm":
        markers, settings = MARKERS + TILE_MARKERS, TILER
    if family.startswith("qwen"):
        markers, settings = QWEN_MARKERS, PATCHER
        mark = "{1}{0}{2}".format(*QWEN_MARKERS)
    spare = [f"<spare_{i}>" for i in range(VOCABULARY - IMAGE - len(markers))]
    template = CHAT_TEMPLATE.replace(MARKERS[0], mark)
    write_tiny_tokenizer(directory, added=[*markers, *spare], chat_template=template)
    text = json.dumps(settings, indent=2)
    (directory / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
    return vlm


def language_of(vlm: TinyVlm, mixers: tuple[str, ...] = ()) -> tuple[DecoderConfig, WeightStore]:
    """The text model of a vision-language model as a decoder of ours.

    Args:
        vlm: of any family but Gemma3, whose norms are stored in a way of their own.
        mixers: of its layers; those that are no softmax have fresh values. None given: softmax.
    """
    store = TextStore(MemoryStore(vlm.model.state_dict()))
    config, _ = parse_config(text_config(vlm.model.config.to_dict()), {})
    config = replace(config, tied_head=store.tied, mixers=mixers or config.mixers)
    return config, with_fresh_mixers(config, store)


Parts = tuple[str, Any, int, Callable[[int], dict[str, torch.Tensor]]]


def _config(name: str, **values: Any) -> Any:
    return getattr(importlib.import_module("transformers"), name)(**values)


def _flat_pixels(images: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(images)
    return {"pixel_values": torch.randn(images, 3, SIDE, SIDE, generator=random)}


def _patch_pixels(images: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(images)
    width = 3 * 2 * PATCH * PATCH  # two frames
    return {
        "pixel_values": torch.randn(images * PATCHES, width, generator=random),
        "image_grid_thw": torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * images),
    }


def _llava(kv_heads: int) -> Parts:
    config = _config(
        "LlavaConfig",
        vision_config=_config("CLIPVisionConfig", projection_dim=32, **VISION),
        text_config=_config("LlamaConfig", **{**TEXT, "num_key_value_heads": kv_heads}),
        image_token_index=IMAGE,
        pad_token_id=PAD,
    )
    return "LlavaForConditionalGeneration", config, PATCHES, _flat_pixels


def _qwen2_vl() -> Parts:
    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return "Qwen2VLForConditionalGeneration", *_qwen("Qwen2VLConfig", vision)


def _qwen2_5_vl() -> Parts:
    """Windows of 2 x 2 merged patches in the first layer, the whole picture in the second."""
    vision = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
    windows = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    parts = _qwen("Qwen2_5_VLConfig", vision | windows)
    return "Qwen2_5_VLForConditionalGeneration", *parts


def _qwen(config: str, vision: dict[str, Any]) -> tuple[Any, int, Callable[[int], Any]]:
    patches = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "temporal_patch_size": 2}
    made = _config(
        config,
        vision_config=vision | patches,
        text_config={**TEXT, "rope_parameters": dict(MROPE)},
        image_token_id=IMAGE,
        video_token_id=VOCABULARY - 1,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return made, PATCHES // 4, _patch_pixels


def _smolvlm() -> Parts:
    config = _config(
        "SmolVLMConfig",
        vision_config=dict(VISION),
        text_config={"model_type": "llama", **TEXT},
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    return "SmolVLMForConditionalGeneration", config, PATCHES // 4, _flat_pixels


def _gemma3() -> Parts:
    text = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}
    config = _config(
        "Gemma3Config",
        vision_config=dict(VISION),
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    return "Gemma3ForConditionalGeneration", config, 4, _flat_pixels


TINY_VLMS: Mapping[str, Callable[[], Parts]] = {
    "llava": lambda: _llava(4),
    "llava-gqa": lambda: _llava(2),
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen2_5_vl,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
}
