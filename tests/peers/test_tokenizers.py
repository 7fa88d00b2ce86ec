"""Three tokenizers read the same bundle: ours, OpenVINO's IR and ONNX Runtime GenAI's."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from edgekit.export import text_files
from edgekit.runtime.text import Tokenizer
from edgekit.sources import open_source
from edgekit.testing import SENTENCES, SPECIAL_TOKENS

pytestmark = pytest.mark.peer

TEXTS = {
    "plain": "Hello, world!",
    "accents": "Crème brûlée à la façon d'Élodie",
    "combining": "e\u0301 is not \u00e9",
    "japanese": "日本語のテキストと漢字",
    "korean": "한국어 텍스트",
    "devanagari": "हिन्दी",
    "right-to-left": "مرحبا עברית",
    "emoji": "👩\u200d👩\u200d👧 family 🇫🇷 flag 🤖🏽",
    "digits": "1234567890 3.14159 1e-10 1,000,000",
    "tabs": "a\tb\t\tc",
    "leading-space": " leading",
    "trailing-space": "trailing ",
    "double-spaces": "two  spaces   three",
    "lines": "\n\nnew\r\nlines\n",
    "code": "def f(x):\n    return x**2  # ok",
    "contractions": "I'm you're they'll DON'T 's 's",
    "chat": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "special-inside": "x<|im_end|>y <|im_start|> spaced",
    "special-cut": "<|im_start",
    "odd-spaces": "\u00a0nbsp\u200bzero\u3000wide\u2028line\ufeffbom",
    "symbols": "Ω≈ç√∫µ≤≥÷ …—“quotes”",
    "numerals": "½ ² ٣ Ⅷ ①②",
    "nul": "a\x00b",
}
STYLES = ("tiny", "smollm2", "with-bos", "metaspace")
# Where ONNX Runtime GenAI divides a text otherwise: it ends at NUL, and where tokenizer.json takes
# every numeral for a digit (SmolLM2, tiny), it takes only some.
ONNX_GAPS = {("tiny", "nul"), ("smollm2", "nul"), ("smollm2", "numerals")}
Styled = Callable[[str], Path]


@pytest.fixture(scope="module")
def styled(bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Styled:
    """`styled("metaspace")` is the tiny softmax bundle with the text files of another tokenizer."""
    made: dict[str, Path] = {}

    def make(style: str) -> Path:
        if style not in made:
            out = tmp_path_factory.mktemp("tokenizers") / style
            shutil.copytree(bundle("softmax"), out)
            if style == "smollm2":
                text_files.write_tokenizer(open_source("smollm2-135m-instruct"), out)
            elif style != "tiny":
                STYLE_WRITERS[style](out)
            if style != "tiny":
                text_files.write_tokenizer_ir(out)
            made[style] = out
        return made[style]

    return make


def write_with_bos(out: Path) -> None:
    """A byte-level BPE whose post-processor puts a bos in front, as Llama 3 has it."""
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(out / "tokenizer.json"))


def write_metaspace(out: Path) -> None:
    """A BPE with U+2581 for spaces and tokens for single bytes, as Llama 2 and Mistral have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token=SPECIAL_TOKENS[0]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Only so that no learned token spans two words.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    trainer = BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(SENTENCES, trainer)
    data = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    words = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    ordered = dict.fromkeys([*SPECIAL_TOKENS, *single_bytes, *words])
    data["model"]["vocab"] = {word: i for i, word in enumerate(ordered)}
    (out / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizer"
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


STYLE_WRITERS = {"with-bos": write_with_bos, "metaspace": write_metaspace}


@pytest.fixture(scope="module")
def openvino_tokenizer(styled: Styled) -> Callable[[str], Any]:
    genai = importlib.import_module("openvino_genai")
    made: dict[str, Any] = {}

    def make(style: str) -> Any:
        if style not in made:
            made[style] = genai.Tokenizer(str(styled(style)))
        return made[style]

    return make


@pytest.fixture(scope="module")
def onnx_tokenizer(styled: Styled) -> Callable[[str], Any]:
    genai = importlib.import_module("onnxruntime_genai")
    made: dict[str, Any] = {}

    def make(style: str) -> Any:
        if style not in made:
            made[style] = genai.Tokenizer(genai.Model(str(styled(style))))
        return made[style]

    return make


@pytest.mark.parametrize("special", [True, False], ids=["special", "bare"])
@pytest.mark.parametrize("style", STYLES)
def test_openvino_gives_our_ids(
    style: str, special: bool, styled: Styled, openvino_tokenizer: Any
) -> None:
    ours, theirs = Tokenizer(styled(style)), openvino_tokenizer(style)
    expected = {
        name: ours.encode(text, add_special_tokens=special).tolist() for name, text in TEXTS.items()
    }
    found = {
        name: theirs.encode(text, add_special_tokens=special).input_ids.data[0].tolist()
        for name, text in TEXTS.items()
    }
    assert found == expected


@pytest.mark.parametrize("skip", [True, False], ids=["skip-special", "keep-special"])
@pytest.mark.parametrize("style", STYLES)
def test_openvino_gives_our_text(
    style: str, skip: bool, styled: Styled, openvino_tokenizer: Any
) -> None:
    ours, theirs = Tokenizer(styled(style)), openvino_tokenizer(style)
    ids = {name: ours.encode(text).tolist() for name, text in TEXTS.items()}
    expected = {n: ours.decode(i, skip_special_tokens=skip) for n, i in ids.items()}
    assert {n: theirs.decode(i, skip_special_tokens=skip) for n, i in ids.items()} == expected
    if style in ("tiny", "smollm2") and not skip:
        assert expected == TEXTS


def test_openvino_pads_on_the_left(openvino_tokenizer: Any) -> None:
    mask = openvino_tokenizer("tiny").encode(["Hello", "Hello, world!"]).attention_mask.data
    assert mask.min() == 0
    assert mask[:, -1].tolist() == [1, 1]


@pytest.mark.parametrize("style", ["tiny", "smollm2"])
def test_chat_prompt_is_the_same_everywhere(
    style: str, styled: Styled, openvino_tokenizer: Any, onnx_tokenizer: Any
) -> None:
    messages = [{"role": "user", "content": "Hi é 日本"}, {"role": "assistant", "content": " ok"}]
    messages.append({"role": "user", "content": "and\n\tthen?"})
    expected = Tokenizer(styled(style)).chat_prompt(messages)
    theirs = openvino_tokenizer(style).apply_chat_template(messages, add_generation_prompt=True)
    assert theirs == expected
    given = json.dumps(messages)
    assert onnx_tokenizer(style).apply_chat_template(given, add_generation_prompt=True) == expected


@pytest.mark.parametrize("style", ["tiny", "smollm2"])
def test_onnxruntime_genai_gives_our_ids_but_for_known_gaps(
    style: str, styled: Styled, onnx_tokenizer: Any
) -> None:
    ours, theirs = Tokenizer(styled(style)), onnx_tokenizer(style)
    differ = {
        (style, name)
        for name, text in TEXTS.items()
        if theirs.encode(text).tolist() != ours.encode(text).tolist()
    }
    assert differ == {gap for gap in ONNX_GAPS if gap[0] == style}


@pytest.mark.parametrize("style", ["tiny", "smollm2"])
def test_onnxruntime_genai_gives_our_text(style: str, styled: Styled, onnx_tokenizer: Any) -> None:
    """It leaves special tokens out, as we do; NUL ends its strings."""
    ours, theirs = Tokenizer(styled(style)), onnx_tokenizer(style)
    ids = {name: ours.encode(text) for name, text in TEXTS.items() if name != "nul"}
    found = {name: theirs.decode(i.astype(np.int32)) for name, i in ids.items()}
    assert found == {name: ours.decode(i) for name, i in ids.items()}


def test_onnxruntime_genai_adds_no_bos(styled: Styled, onnx_tokenizer: Any) -> None:
    """Gap: where tokenizer.json puts a bos in front, its users must write it themselves."""
    expected = Tokenizer(styled("with-bos")).encode("Hello").tolist()
    assert [1, *onnx_tokenizer("with-bos").encode("Hello").tolist()] == expected
    written = onnx_tokenizer("with-bos").encode("<|im_start|>Hello").tolist()
    assert written == expected
