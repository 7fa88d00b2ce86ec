"""The two halves of a vision-language checkpoint: its text model as a plain decoder, and the rest.

Checkpoints of several ages name the text model's tensors in several ways; what they have in common
is the table of token embeddings, whose name tells the prefix of all of them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from edgekit.bundle import TileTexts, VisionFacts
from edgekit.errors import SourceError
from edgekit.models.weights import WeightStore
from edgekit.runtime.images_tiles import TileProcessor
from edgekit.sources.base import VisionSource, read_json

__all__ = [
    "BIDIRECTIONAL",
    "PATCHED",
    "VISION_FAMILIES",
    "TextStore",
    "is_vision_language",
    "text_config",
    "vision_facts",
    "vision_source",
]

# By family: texts around the image tokens of a picture, and around its placeholder where a prompt
# has none.
MARKERS: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "llava": (("", ""), ("", "\n")),
    "smolvlm": (
        ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
        ("", "\n"),
    ),
    "idefics3": (
        ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
        ("", "\n"),
    ),
    "qwen2_vl": (("", ""), ("<|vision_start|>", "<|vision_end|>")),
    "qwen2_5_vl": (("", ""), ("<|vision_start|>", "<|vision_end|>")),
    "gemma3": (("\n\n", "\n\n"), ("", "")),  # around the markers that its config names
}
VISION_FAMILIES = tuple(MARKERS)
BIDIRECTIONAL = ("gemma3",)  # tokens of one picture see each other
PATCHED = ("qwen2_vl", "qwen2_5_vl")  # read pictures of any size, in patches
TILE_TEXTS = TileTexts(
    before="<fake_token_around_image><row_{row}_col_{column}>", row_end="\n", end="\n"
)
TILED = ("smolvlm", "idefics3")  # read pictures of any size, in tiles and a small copy
USUAL_SIDE = 224  # of the pictures that such a vision side reads, where its config leaves it out
TEXT_FAMILIES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
TEXT_PARTS = ("embed_tokens.", "layers.", "norm.")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
IMAGE_TOKENS = ("image_token_id", "image_token_index")  # the key's new and old name
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_vision_language(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a family whose pictures edgekit reads."""
    return config.get("model_type") in VISION_FAMILIES


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's configuration, with the defaults that config.json leaves out.

    Args:
        config: the contents of config.json.

    Raises:
        SourceError: if transformers cannot read it.
    """
    from transformers import CONFIG_MAPPING

    try:
        whole = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        text: dict[str, Any] = whole.get_text_config(decoder=True).to_dict()
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        raise SourceError(f"config.json: its text_config cannot be read ({cause})") from cause
    text["model_type"] = TEXT_FAMILIES.get(text["model_type"], text["model_type"])
    outside = {key: config[key] for key in TOKENS if config.get(key) is not None}
    return {**text, **{key: value for key, value in outside.items() if text.get(key) is None}}


def vision_source(directory: Path, config: Mapping[str, Any]) -> VisionSource:
    """What the vision side of a model directory says of itself.

    Raises:
        SourceError: if no image token, or no image processor, is named, or that makes tiles of
            another size than the vision side reads.
        BundleError: if the image processor should make tiles, and does not say how.
    """
    found = [config[key] for key in IMAGE_TOKENS if config.get(key) is not None]
    if not found or not isinstance(found[0], int):
        raise SourceError(f"{directory / 'config.json'}: has no {IMAGE_TOKENS[0]}; fetch it again")
    processor = _image_processor(directory)
    _check_tiles(directory, config, processor)
    return VisionSource(
        family=str(config["model_type"]),
        image_token_id=found[0],
        processor=processor,
        merge=_merge(config),
        markers=_markers(config),
    )


def _check_tiles(directory: Path, config: Mapping[str, Any], processor: Mapping[str, Any]) -> None:
    if config["model_type"] not in TILED:
        return
    side = config.get("vision_config", {}).get("image_size", USUAL_SIDE)
    tile = TileProcessor.of(processor, where=f"{directory}: its image processor").side
    if tile != side:
        raise SourceError(
            f"{directory}: max_image_size {tile} given, for tiles; allowed: {side}, the image_size "
            "of the vision side, whose graph has one size"
        )


def _merge(config: Mapping[str, Any]) -> int | None:
    if config["model_type"] not in PATCHED:
        return None
    return int(config.get("vision_config", {}).get("spatial_merge_size", 2))


def _markers(config: Mapping[str, Any]) -> tuple[int, int] | None:
    found = [config.get(key) for key in ("boi_token_index", "eoi_token_index")]
    first, last = found
    if not isinstance(first, int) or not isinstance(last, int):
        return None
    return first, last


def vision_facts(vision: VisionSource, directory: Path, tokens: int | None) -> VisionFacts:
    """How pictures come into prompts.

    Args:
        vision: of the source.
        directory: holds tokenizer.json.
        tokens: embeddings of one picture, or of one of its squares; None: by its size.

    Raises:
        SourceError: if there is no tokenizer, or it does not know the image token.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise SourceError(f"{directory}: has no tokenizer.json, which prompts with pictures need")
    tokenizer = Tokenizer.from_file(str(path))
    ids = (vision.image_token_id, *(vision.markers or ()))
    token, *markers = (tokenizer.id_to_token(number) for number in ids)
    if None in (token, *markers):
        raise SourceError(
            f"{path}: lacks one of the tokens {', '.join(map(str, ids))}, which config.json names "
            "for images; fetch the model again"
        )
    (before, after), (opening, closing) = MARKERS[vision.family]
    if markers:
        before, after = before + markers[0], markers[1] + after
    placeholder = markers[0] if markers else token
    return VisionFacts(
        family=vision.family,
        image_token_id=vision.image_token_id,
        image_token=token,
        tokens=tokens,
        placeholder=placeholder,
        inserted=f"{opening}{placeholder}{closing}",
        before=before,
        after=after,
        merge=vision.merge,
        tiles=TILE_TEXTS if vision.family in TILED else None,
    )


def _image_processor(directory: Path) -> dict[str, Any]:
    """Its settings: a file of its own, or a part of the processor's."""
    for name in PROCESSORS:
        if not (directory / name).is_file():
            continue
        found = read_json(directory / name)
        settings = found.get("image_processor", found)
        if isinstance(settings, dict) and "image_mean" in settings:
            return settings
    raise SourceError(
        f"{directory}: has no {PROCESSORS[0]}, so nothing says how pictures are read; add it"
    )


class TextStore:
    """The text model's tensors under the names of a plain decoder; the others are not there."""

    def __init__(self, base: WeightStore) -> None:
        """Find the text model in `base`.

        Raises:
            SourceError: if it has no table of token embeddings, or several.
        """
        tables = [name for name in base if name.endswith(EMBEDDING)]
        if len(tables) != 1:
            raise SourceError(
                f"the checkpoint has {len(tables)} tensors called {EMBEDDING}; allowed: one"
            )
        prefix = tables[0].removesuffix(EMBEDDING)
        self._base = base
        parts = tuple(prefix + part for part in TEXT_PARTS)  # the vision side may share the prefix
        self._names = {
            f"model.{name.removeprefix(prefix)}": name for name in base if name.startswith(parts)
        }
        head = next((name for name in base if name.endswith(HEAD)), None)
        if head is not None:
            self._names[HEAD] = head

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    @property
    def tied(self) -> bool:
        """Whether the head is the table of token embeddings."""
        if HEAD not in self:
            return True
        head, table = self.tensor(HEAD), self.tensor(f"model.{EMBEDDING}")
        return head.shape == table.shape and torch.equal(head, table)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, as it is stored."""
        if name not in self._names:
            raise SourceError(f"the source has no tensor {name!r}; is the checkpoint complete?")
        return self._base.tensor(self._names[name])
