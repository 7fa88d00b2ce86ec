"""The tokenizer and configuration files of a bundle, which four runtimes read."""

import json
import shutil
from pathlib import Path
from typing import Any

from edgekit.config import dump
from edgekit.errors import SourceError
from edgekit.models.config import DecoderConfig
from edgekit.sources import Source
from edgekit.sources.quiet import quiet_transformers

__all__ = ["write_configs", "write_tokenizer", "write_tokenizer_ir"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
VOCABULARIES = ("tokenizer.model", "vocab.json", "tekken.json")


def write_tokenizer(source: Source, out: Path) -> None:
    """Copy the tokenizer's files; one without `tokenizer.json` is converted by transformers.

    Raises:
        SourceError: if the source has no tokenizer at all, or a damaged one.
    """
    if (source.directory / "tokenizer.json").is_file():
        _check_tokenizer(source.directory / "tokenizer.json")
        for name in TOKENIZER_FILES:
            if (source.directory / name).is_file():
                shutil.copyfile(source.directory / name, out / name)
        return
    # Without a vocabulary, transformers would make up an empty tokenizer and not complain.
    if not any((source.directory / name).is_file() for name in VOCABULARIES):
        raise SourceError(f"{source.directory}: has no tokenizer; add its tokenizer.json")
    _load_tokenizer(source.directory).save_pretrained(out)
    if not (out / "tokenizer.json").is_file():
        raise SourceError(
            f"{source.directory}: its tokenizer has no tokenizer.json form; add tokenizer.json"
        )


def _check_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as cause:  # the tokenizers library raises this very class
        raise SourceError(f"{path}: damaged ({cause}); fetch it again") from cause


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():  # it tells of every form that it tried
            return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (ImportError, OSError, ValueError) as cause:
        raise SourceError(
            f"{directory}: no usable tokenizer ({cause}); add tokenizer.json"
        ) from cause


def write_tokenizer_ir(out: Path) -> None:
    """Write `openvino_tokenizer.xml` and `openvino_detokenizer.xml` from the tokenizer in `out`.

    Raises:
        OSError: if the disk is full.
    """
    from openvino_tokenizers import convert_tokenizer
    from transformers import PreTrainedTokenizerFast

    from edgekit.export.openvino_file import save_ir

    # Never AutoTokenizer: by `tokenizer_class` it may build another one than tokenizer.json says.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out, local_files_only=True)
    tokenizer.padding_side = "left"  # what the graphs expect, and so LLMPipeline's batches
    models = convert_tokenizer(tokenizer, with_detokenizer=True)
    for model, name in zip(models, ("tokenizer", "detokenizer"), strict=True):
        save_ir(model, out / f"openvino_{name}.xml")


def write_configs(source: Source, config: DecoderConfig, out: Path) -> None:
    """Write `config.json` with an `edgekit` block, and `generation_config.json`.

    The base `model_type` stays, so that Optimum and OpenVINO GenAI load the bundle as they load its
    teacher.
    """
    foreign = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
    foreign["edgekit"] = {"decoder": dump(config)}
    foreign["tie_word_embeddings"] = config.tied_head
    _write_json(out / "config.json", foreign)
    generation = source.directory / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, out / generation.name)
        return
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    _write_json(out / generation.name, {k: v for k, v in tokens.items() if v not in (None, [])})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
