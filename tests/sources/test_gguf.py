import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgekit.errors import SourceError, UnsupportedError
from edgekit.models.config import RopeConfig
from edgekit.models.decoder import Decoder
from edgekit.models.rope import inverse_frequencies
from edgekit.sources import Source, open_source
from edgekit.sources.gguf import open_gguf

Tiny = Callable[..., Path]
WriteGguf = Callable[..., Path]
Type = gguf.GGMLQuantizationType

SENTENCE = "The cápital of  France\tis Paris 1234. 日本 🙂\n"
FAMILIES = {
    "llama": ("llama", {}, "smollm"),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}, "llama-bpe"),
    "llama-untied": ("llama", {"tie_word_embeddings": False, "head_dim": 24}, "smollm"),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen3": ("qwen3", {}, "qwen2"),
}


def our_logits(source: Source, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return Decoder.from_store(source.config, source.weights)(ids)[0]


@pytest.mark.parametrize("case", FAMILIES)
def test_a_gguf_file_reads_back_to_the_same_logits(
    case: str, tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    family, options, pre = FAMILIES[case]
    original = tiny_checkpoint(family, **options)
    source = open_source(write_gguf(original, tmp_path / "model.gguf", pre=pre))
    ids = torch.randint(0, 320, (2, 50))
    expected = our_logits(open_source(original), ids)
    assert (our_logits(source, ids) - expected).abs().max() <= 1e-4
    foreign = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    with torch.inference_mode():
        assert (foreign(ids).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("quantization", "largest"),
    [(Type.F16, 0.02), (Type.BF16, 0.2), (Type.Q8_0, 0.5), (Type.Q4_1, 8.0)],
    ids=lambda value: value.name if isinstance(value, Type) else None,
)
def test_stored_types_are_decoded(
    quantization: Type,
    largest: float,
    tiny_checkpoint: Tiny,
    write_gguf: WriteGguf,
    tmp_path: Path,
) -> None:
    original = tiny_checkpoint("llama")
    path = write_gguf(original, tmp_path / "model.gguf", quantization=quantization)
    ids = torch.randint(0, 320, (1, 40))
    expected = our_logits(open_source(original), ids)
    error = (our_logits(open_source(path), ids) - expected).abs().max()
    assert 0 < error < largest


def test_source_facts(tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path) -> None:
    original = tiny_checkpoint("llama")
    source = open_source(write_gguf(original, tmp_path / "my-model.gguf"))
    assert source.name == "my-model"
    assert source.identity["kind"] == "gguf"
    assert len(source.identity["sha256"]) == 64
    assert any("dequantised" in note for note in source.notes)
    assert source.config == open_source(original).config


def test_the_conversion_is_cached_whole(
    tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path, private_cache: Path
) -> None:
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf")
    first = open_source(path).directory
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert open_source(path).directory == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in (private_cache / "gguf").iterdir()] == [first.name]


KILLED = """
import os, signal, sys
from edgekit.sources import gguf, open_source
gguf.write_weights = lambda metadata, out: os.kill(os.getpid(), signal.SIGKILL)
open_source(sys.argv[1])
"""


def test_what_a_killed_conversion_left_is_removed_by_the_next(
    tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path, private_cache: Path
) -> None:
    original = tiny_checkpoint("llama")
    path = write_gguf(original, tmp_path / "model.gguf")
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((private_cache / "gguf").iterdir())) == 1
    other = write_gguf(original, tmp_path / "other.gguf", extra={"general.version": "another"})
    made = open_source(other).directory
    assert list((private_cache / "gguf").iterdir()) == [made]


def test_a_conversion_that_another_one_overtook_succeeds(
    tiny_checkpoint: Tiny,
    write_gguf: WriteGguf,
    tmp_path: Path,
    private_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf")
    rename = Path.rename

    def late(work: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        open_source(path)
        assert (work / "model.safetensors").is_file()  # the other one left it alone
        return rename(work, target)

    monkeypatch.setattr(Path, "rename", late)
    made = open_source(path).directory
    assert Path.rename is rename
    assert list((private_cache / "gguf").iterdir()) == [made]


def test_an_unreadable_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot be read \(.+\); give a GGUF file"):
        open_gguf(tmp_path)


def test_tokenizer_files(tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path) -> None:
    original = tiny_checkpoint("llama")
    rebuilt = open_source(write_gguf(original, tmp_path / "model.gguf")).directory
    ours, theirs = (AutoTokenizer.from_pretrained(d) for d in (rebuilt, original))
    text = f"<|im_start|>user\n{SENTENCE}<|im_end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(SENTENCE)) == SENTENCE
    assert (len(ours), ours.bos_token, ours.eos_token) == (320, "<|im_start|>", "<|im_end|>")
    assert ours.chat_template == theirs.chat_template
    assert json.loads((rebuilt / "generation_config.json").read_text())["eos_token_id"] == 2


PRE_TOKENIZED = {
    "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġok", "Ġ", "Ġnow", "!", "Ċ"],
    "qwen2": ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġok", "Ġ", "Ġnow", "!Ċ"],
    "llama-bpe": ["It", "'s", "Ġ", "123", "4", "Ġok", "Ġ", "Ġnow", "!Ċ"],
}


@pytest.mark.parametrize("pre", PRE_TOKENIZED)
def test_pre_tokenizers(
    pre: str, tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    source = open_source(write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf", pre=pre))
    tokenizer = Tokenizer.from_file(str(source.directory / "tokenizer.json"))
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234 ok  now!\n")
    assert [piece for piece, _ in pieces] == PRE_TOKENIZED[pre]
    begins = tokenizer.encode("a").ids[0] == 1
    assert begins == (pre == "llama-bpe")


def test_llama3_rope_is_recovered_from_the_stored_divisors(
    tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    rope = RopeConfig(theta=10000.0, kind="llama3", factor=32.0)
    divisors = inverse_frequencies(RopeConfig(), 16) / inverse_frequencies(rope, 16)
    extra = {"rope_freqs.weight": divisors.numpy()}
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf", tensors=extra)
    assert open_source(path).config.rope == rope
    odd = {"rope_freqs.weight": np.linspace(1, 5, 8, dtype=np.float32)}
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "odd.gguf", tensors=odd)
    with pytest.raises(UnsupportedError, match="not a llama3 scaling"):
        open_source(path)


def test_a_sliding_window_is_honoured(
    tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    window = {"llama.attention.sliding_window": 128}
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf", extra=window)
    source = open_source(path)
    assert (source.config.family, source.config.context_length) == ("mistral", 128)
    assert any("sliding window" in note for note in source.notes)


REFUSED = {
    "another-family": ({"architecture": "gemma3"}, "architecture 'gemma3' given; supported: Llama"),
    "sentencepiece": ({"tokenizer_model": "llama"}, "GGUF tokenizer 'llama' given"),
    "unknown-pre-tokenizer": ({"pre": "tekken"}, "pre-tokenizer 'tekken' given; supported: llama"),
    "experts": ({"extra": {"llama.expert_count": 8}}, "mixture of experts"),
    "partial-rotary": ({"extra": {"llama.rope.dimension_count": 8}}, "8 of 16 head columns"),
    "yarn": ({"extra": {"llama.rope.scaling.type": "yarn"}}, "rope scaling 'yarn' given"),
    "split": ({"extra": {"split.count": 2}}, "one part of a split GGUF"),
    "foreign-tensor": (
        {"tensors": {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}},
        r"'blk\.0\.attn_sinks\.weight' has no place",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_and_leaves_nothing(
    case: str,
    tiny_checkpoint: Tiny,
    write_gguf: WriteGguf,
    tmp_path: Path,
    private_cache: Path,
) -> None:
    options, message = REFUSED[case]
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf", **options)
    with pytest.raises(UnsupportedError, match=message):
        open_source(path)
    assert not list(private_cache.glob("gguf/*"))


def test_truncated_files_are_refused(
    tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path, private_cache: Path
) -> None:
    whole = write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf").read_bytes()
    path = tmp_path / "short.gguf"
    for keep in itertools.chain((0, 3, 10, 50, 500), range(1000, len(whole), 50_000)):
        path.write_bytes(whole[:keep])
        with pytest.raises(SourceError, match=r"truncated or damaged|not a GGUF file"):
            open_source(path)
    assert not list(private_cache.glob("gguf/*"))


def test_another_file_type_by_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 this is a zip file")
    with pytest.raises(SourceError, match="not a GGUF file"):
        open_source(tmp_path / "model.gguf")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such source"):
        open_source(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match="no such source"):
        open_source("models/model.gguf")


def test_unwritable_cache_is_said(
    tiny_checkpoint: Tiny,
    write_gguf: WriteGguf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="make room or set EDGEKIT_CACHE"):
        open_source(path)


def test_a_damaged_cache_is_said_not_used(
    tiny_checkpoint: Tiny, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf")
    cached = open_source(path).directory
    (cached / "model.safetensors").write_bytes(b"short")
    with pytest.raises(SourceError, match="truncated, damaged"):
        open_source(path)
    shutil.rmtree(cached)
    assert open_source(path).directory == cached
