"""Tiny models and numeric comparison, for tests and benchmarks.

Example:
    >>> write_tiny_checkpoint(Path("tiny"), "qwen3")                # doctest: +SKIP
    PosixPath('tiny')
    >>> assert_close("y", reference, actual, ratio=TOLERANCE["float32"])   # doctest: +SKIP
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from edgekit.errors import UsageError
from edgekit.models.config import DecoderConfig, LawcatConfig
from edgekit.models.decoder import Decoder, with_fresh_mixers
from edgekit.models.weights import MemoryStore, OverlayStore, WeightStore

__all__ = [
    "SENTENCES",
    "TINY_FAMILIES",
    "TOLERANCE",
    "assert_close",
    "relative_error",
    "scrambled_decoder",
    "write_tiny_checkpoint",
    "write_tiny_student",
    "write_tiny_tokenizer",
]

# RMS(error) / RMS(reference) that two correct computations in this dtype stay below.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}

TINY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
CONFIG_CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma3_text": "Gemma3TextConfig",
}
TINY_SIZES: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
# Qwen3's heads are wider than hidden / heads, so that code which derives one from the other fails.
# Gemma3's scale is not that of its heads, and its window shorter than most tests' sequences.
FAMILY_SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 21,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Once upon a time there was a small model that ran on a small machine and was content.",
    "def convert(source, out): return the number of tokens, 1234567890, in the answer.",
)


def write_tiny_checkpoint(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a small random Hugging Face checkpoint with a real tokenizer.

    3 layers, hidden 64, 4 query and 2 KV heads of 16 (Qwen3: 24, Gemma3: 32), vocabulary 320,
    context 512.
    Biases and norms are random, so that forgetting one shows; logits have a deviation of about 2.

    Args:
        directory: created if need be.
        family: one of `TINY_FAMILIES`.
        seed: of every random value.
        dtype: how the tensors are stored, such as "bfloat16".
        max_shard_size: as in `save_pretrained`; a small one makes a sharded checkpoint.
        overrides: keys of the family's configuration, such as `tie_word_embeddings=False`.

    Returns:
        `directory`.

    Raises:
        UsageError: if the family, or a key of its configuration, is unknown.
    """
    if family not in TINY_FAMILIES:
        raise UsageError(f"family {family!r} is unknown; known: {', '.join(TINY_FAMILIES)}")
    transformers: Any = importlib.import_module("transformers")  # slow to load; typed only in part
    config_class = getattr(transformers, CONFIG_CLASSES[family])
    settings = {**TINY_SIZES, **FAMILY_SIZES[family], **overrides}
    unknown = sorted(key for key in settings if not _is_setting(config_class, key))
    if unknown:
        raise UsageError(f"{CONFIG_CLASSES[family]} has no key {unknown[0]!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config_class(**settings))
        _randomise(model)
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    write_tiny_tokenizer(directory)
    return directory


def _is_setting(config_class: Any, key: str) -> bool:
    return key in ("rope_scaling", "rope_theta") or hasattr(config_class(), key)


def _randomise(model: torch.nn.Module) -> None:
    """Fill every parameter so that activations and logits keep a scale of 1 to 5."""
    centre = 0.0 if "Gemma" in type(model).__name__ else 1.0  # whose norms add 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)


def write_tiny_tokenizer(
    directory: Path, *, added: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE
) -> None:
    """A byte-level BPE with single digits and the ChatML markers, in Hugging Face's files.

    Args:
        directory: where they go.
        added: special tokens with the last ids of the 320.
        chat_template: of Jinja.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_SIZES["vocab_size"] - len(added),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in added])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[2],
        "unk_token": SPECIAL_TOKENS[0],
        "model_max_length": TINY_SIZES["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "chat_template.jinja").write_text(chat_template)


Array = torch.Tensor | npt.NDArray[Any]


def scrambled_decoder(
    checkpoint: Path, mixers: tuple[str, ...], sharing: str, **lawcat: Any
) -> tuple[DecoderConfig, WeightStore, Decoder]:
    """A checkpoint's decoder with random values for what its mixers add.

    A fresh mixer is nearly the identity, which hides errors.

    Args:
        checkpoint: a Hugging Face directory.
        mixers: token mixer of each layer.
        sharing: LAWCAT's `state_sharing`.
        lawcat: other settings of `LawcatConfig`.

    Returns:
        The configuration, its tensors and the loaded torch decoder.
    """
    from edgekit.sources import open_source

    source = open_source(checkpoint)
    options = LawcatConfig(state_sharing=sharing, **lawcat)  # type: ignore[arg-type]
    config = source.config.with_mixers(mixers, options)
    fresh = with_fresh_mixers(config, source.weights)
    added = {n: 0.5 * torch.randn_like(fresh.tensor(n)) for n in fresh if n not in source.weights}
    weights = OverlayStore(MemoryStore(added), source.weights)
    return config, weights, Decoder.from_store(config, weights)


def write_tiny_student(
    directory: Path,
    base: str | Path,
    mixers: tuple[str, ...],
    *,
    name: str = "tiny",
    rank: int = 2,
    dtype: Literal["float16", "float32"] = "float16",
    **lawcat: Any,
) -> Path:
    """Write a student that no training made: mixers off their fresh values, random differences.

    Args:
        directory: made here.
        base: the teacher, as for `open_source`.
        mixers: token mixer of each layer; those that are not softmax get a difference on q, k, v
            and o.
        name: as the manifest says it.
        rank: of each difference.
        dtype: how tensors are stored.
        lawcat: settings of `LawcatConfig`.

    Returns:
        `directory`.
    """
    from edgekit.sources import open_source
    from edgekit.sources.student import StageRecord, StudentManifest, write_student

    source = open_source(base)
    config = source.config.with_mixers(mixers, LawcatConfig(**lawcat))
    fresh = with_fresh_mixers(config, source.weights)
    tensors = {n: fresh.tensor(n) for n in fresh if n not in source.weights}
    tensors = {n: t + 0.05 * torch.randn_like(t) for n, t in tensors.items()}
    for layer in (i for i, mixer in enumerate(mixers) if mixer != "softmax"):
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            stem = f"model.layers.{layer}.self_attn.{projection}"
            out, width = source.weights.tensor(f"{stem}.weight").shape
            tensors[f"{stem}.lowrank_a"] = torch.randn(rank, width) / width**0.5
            tensors[f"{stem}.lowrank_b"] = 0.1 * torch.randn(out, rank)
    directory.mkdir(parents=True)
    stages = (
        StageRecord(stage=i, steps=9, tokens=n, seconds=1.5, loss=0.25, device="none")
        for i, n in ((1, 1_200_000), (2, 300_000))
    )
    manifest = StudentManifest(
        name=name,
        base=source.identity,
        mixers=mixers,
        lawcat=config.lawcat,
        lolcats=config.lolcats if "lolcats" in mixers else None,
        recipe={"name": "none"},
        training=tuple(stages),
    )
    write_student(directory, manifest, tensors, dtype=dtype)
    return directory


def relative_error(reference: Array, actual: Array) -> float:
    """RMS(actual - reference) / RMS(reference), in fp64; 0 when both are zero everywhere."""
    expected, got = _double(reference), _double(actual)
    error = float(np.sqrt(np.mean((got - expected) ** 2))) if expected.size else 0.0
    scale = float(np.sqrt(np.mean(expected**2))) if expected.size else 0.0
    return error / scale if scale else error


def assert_close(name: str, reference: Array, actual: Array, *, ratio: float) -> None:
    """Check shape, finiteness and relative error of `actual`; NumPy arrays and torch tensors alike.

    Args:
        name: said in the failure.
        reference: what is taken as true.
        actual: what is checked.
        ratio: the largest relative error allowed, usually `TOLERANCE[dtype]`.

    Raises:
        AssertionError: if shapes differ, a value is not finite, or the error is too large.
    """
    if tuple(reference.shape) != tuple(actual.shape):
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, not {tuple(reference.shape)}")
    if not np.isfinite(_double(actual)).all():
        raise AssertionError(f"{name}: has values that are not finite")
    error = relative_error(reference, actual)
    if not error <= ratio:
        raise AssertionError(f"{name}: relative error {error:.3g} is above {ratio:.3g}")


def _double(array: Array) -> npt.NDArray[np.float64]:
    if isinstance(array, torch.Tensor):
        return array.detach().cpu().double().numpy()
    return np.asarray(array, dtype=np.float64)
