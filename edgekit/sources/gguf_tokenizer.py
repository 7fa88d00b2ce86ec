"""The tokenizer of a GGUF file, rebuilt as Hugging Face's tokenizer.json.

GGUF stores the vocabulary and the merges of a byte-level BPE but only the *name* of its
pre-tokenizer; a wrong guess there is silent, so an unknown name is refused.
"""

from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from edgekit.errors import SourceError, UnsupportedError
from edgekit.sources.gguf_config import Metadata
from edgekit.sources.gguf_weights import write_json

__all__ = ["write_tokenizer"]

CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class TokenType(IntEnum):
    """The kinds of vocabulary entry that matter here, as GGUF numbers them."""

    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


def write_tokenizer(metadata: Metadata, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja.

    Raises:
        UnsupportedError: if it is no byte-level BPE, or its pre-tokenizer is unknown.
        SourceError: if the vocabulary or the merges are missing.
    """
    tokens = metadata.shared("tokenizer.ggml.tokens")
    pre = str(metadata.shared("tokenizer.ggml.pre"))
    _check(metadata, pre)
    tokenizer = _bpe(metadata, tokens)
    PRE_TOKENIZERS[pre](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    bos = metadata.shared("tokenizer.ggml.bos_token_id")
    if metadata.shared("tokenizer.ggml.add_bos_token", pre in LLAMA_BPE) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", _settings(metadata, tokens))
    template = metadata.shared("tokenizer.chat_template")
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _check(metadata: Metadata, pre: str) -> None:
    model = metadata.shared("tokenizer.ggml.model")
    if model != "gpt2":
        raise UnsupportedError(
            f"GGUF tokenizer {model!r} given; supported: 'gpt2', a byte-level BPE "
            "(use the model's Hugging Face directory instead)"
        )
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"GGUF pre-tokenizer {pre!r} given; supported: {', '.join(sorted(PRE_TOKENIZERS))} "
            "(use the model's Hugging Face directory instead)"
        )
    for key in ("tokens", "merges", "token_type"):
        if not metadata.shared(f"tokenizer.ggml.{key}"):
            raise SourceError(f"the GGUF file has no tokenizer.ggml.{key}; is it whole?")


def _bpe(metadata: Metadata, tokens: list[str]) -> Any:
    types = metadata.shared("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ", 1)) for m in metadata.shared("tokenizer.ggml.merges")]
    # Padding entries exist to round the embedding up; no text may become one.
    vocab = {t: i for i, t in enumerate(tokens) if types[i] != TokenType.UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    added = (TokenType.CONTROL, TokenType.USER_DEFINED)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)
            for token, kind in zip(tokens, types, strict=True)
            if kind in added
        ]
    )
    return tokenizer


def _settings(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: metadata.shared(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[index] for name, index in ids.items() if index is not None},
        "model_max_length": metadata.need("context_length"),
        "clean_up_tokenization_spaces": False,
    }


def _smollm(tokenizer: Any) -> None:
    """Every digit alone, then GPT-2's pattern, which is ByteLevel's own."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _qwen2(tokenizer: Any) -> None:
    tokenizer.normalizer = normalizers.NFC()
    _split(tokenizer, r"\p{N}")


def _llama_bpe(tokenizer: Any) -> None:
    tokenizer.model.ignore_merges = True
    _split(tokenizer, r"\p{N}{1,3}")


def _split(tokenizer: Any, digits: str) -> None:
    pattern = Regex(f"{CONTRACTIONS_AND_WORDS}|{digits}|{REST}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA_BPE = ("llama-bpe", "llama-v3", "llama3")
PRE_TOKENIZERS: dict[str, Callable[[Any], None]] = {
    "smollm": _smollm,
    "qwen2": _qwen2,
    **dict.fromkeys(LLAMA_BPE, _llama_bpe),
}
