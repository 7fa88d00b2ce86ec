"""What a source is, once opened, whatever it was: a directory in Hugging Face's layout."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import SourceError
from edgekit.models.config import DecoderConfig
from edgekit.models.weights import WeightStore

__all__ = ["Source", "VisionSource", "read_json", "sha256_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSource:
    """The vision side of a source.

    Attributes:
        family: `model_type` of the whole model, such as "llava".
        image_token_id: stands for one embedding of a picture among token ids.
        processor: how a picture becomes pixels, as `preprocessor_config.json` says it.
        merge: patches along each side of one embedding, where pictures have any size; else None.
        markers: tokens before and after the image tokens of a picture, of which the first stands
            for the picture in a prompt; None: the family's usual texts.
    """

    family: str
    image_token_id: int
    processor: dict[str, Any]
    merge: int | None = None
    markers: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An opened model.

    Attributes:
        name: short and readable, such as "SmolLM2-135M-Instruct".
        directory: holds config.json, *.safetensors, tokenizer.json, tokenizer_config.json, ...
        config: the decoder; every layer's mixer is "softmax".
        weights: tensors under Llama's checkpoint names, memory-mapped.
        identity: JSON-ready; kind ("hf-directory", "hub", "gguf" or "built-in"), name, sha256 of
            the weights, and for the Hub the revision.
        notes: what the user should be told, one sentence each.
        vision: what reads pictures for the decoder; None: nothing does.
    """

    name: str
    directory: Path
    config: DecoderConfig
    weights: WeightStore
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()
    vision: VisionSource | None = None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        SourceError: if the file is missing, unreadable, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise SourceError(f"{path}: missing; a model directory needs {path.name}") from cause
    except (OSError, ValueError) as cause:
        raise SourceError(f"{path}: not readable as JSON ({cause}); fetch it again") from cause
    if not isinstance(data, dict):
        raise SourceError(f"{path}: holds no JSON object; fetch it again")
    return data


def sha256_of(paths: Sequence[Path]) -> str:
    """sha256 (hex) over the contents of `paths`, in the order given.

    Raises:
        SourceError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                part = hashlib.file_digest(file, "sha256")
        except OSError as cause:
            raise SourceError(f"{path}: cannot be read ({cause.strerror})") from cause
        if len(paths) == 1:
            return part.hexdigest()
        digest.update(part.digest())
    return digest.hexdigest()
