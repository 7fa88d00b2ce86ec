"""Tokens and text: nothing added, nothing torn, stop strings and chat templates."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, processors

from edgekit.errors import BundleError, UsageError
from edgekit.runtime.text import Detokenizer, StopFilter, Tokenizer

TEXTS = {
    "plain": "The capital of France is Paris.",
    "emoji": "na\u00efve \U0001f468\u200d\U0001f469\u200d\U0001f467 caf\u00e9 \u20ac5 \U0001f600!",
    "cjk": "\u65e5\u672c\u8a9e\u3068\u4e2d\u6587, \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "spaces": "  two  spaces\n\n\tand a tab ",
    "real-replacement": "a \ufffd b\ufffd",
}


@pytest.fixture(scope="module")
def directory(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer in SentencePiece's manner: `<0xE2>` tokens, and a decoder that strips a space."""
    words = ["<unk>", "\u2581the", "\u2581", "the", "\u2581river", "s", "e", "\u2581a"]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    folder = tmp_path_factory.mktemp("byte-fallback")
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def without_torn_characters(pieces: list[str], whole: str) -> bool:
    return sum(piece.count("\ufffd") for piece in pieces) == whole.count("\ufffd")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_encoding_round_trips_and_pieces_join(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    pieces = pieces_of(tokenizer, ids)
    assert tokenizer.decode(ids) == text
    assert "".join(pieces) == text
    assert without_torn_characters(pieces, text)


def test_pieces_of_random_tokens_join(tokenizer: Tokenizer, byte_fallback: Tokenizer) -> None:
    draw = random.Random(0)
    for given in (tokenizer, byte_fallback):
        for _ in range(300):
            ids = [draw.randrange(given.vocab_size) for _ in range(draw.randrange(1, 40))]
            assert "".join(pieces_of(given, ids)) == given.decode(ids)


def test_pieces_of_byte_fallback_join(byte_fallback: Tokenizer) -> None:
    names = ["\u2581the", "\u2581river", "<0xE2>", "<0x82>", "<0xAC>", "s", "\u2581", "\u2581a"]
    ids = [byte_fallback._tokenizer.token_to_id(name) for name in names]
    pieces = pieces_of(byte_fallback, ids)
    assert "".join(pieces) == byte_fallback.decode(ids) == "the river\u20acs  a"
    assert without_torn_characters(pieces, "")


def test_a_cut_character_comes_last(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab\u20ac").tolist()[:-1]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces[:-1]) == "ab"
    assert pieces[-1] == "\ufffd"


def test_nothing_is_added_unless_the_tokenizer_says_so(directory: Path, tmp_path: Path) -> None:
    assert Tokenizer(directory).encode("the")[0] != 1
    with_bos = _with_bos(directory, tmp_path / "bos")
    assert with_bos.encode("the")[0] == 1
    assert with_bos.encode("the", add_special_tokens=False)[0] != 1
    assert with_bos.encode_prompt("the").tolist().count(1) == 1
    assert with_bos.encode_prompt("<|im_start|>the").tolist().count(1) == 1


def _with_bos(directory: Path, out: Path) -> Tokenizer:
    shutil.copytree(directory, out)
    made = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=64)
    made.save(str(out / "tokenizer.json"))
    return Tokenizer(out)


def test_training_leftovers_do_not_cut_or_pad(directory: Path, tmp_path: Path) -> None:
    tokenizer = _with_bos(directory, tmp_path / "bos")
    assert tokenizer.decode(tokenizer.encode("The capital of France")) == "The capital of France"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("hello STOP world", ["STOP"], "hello "),
        ("aababac", ["abac"], "aab"),
        ("one two three", ["three", "two"], "one "),
        ("ab", ["abc"], "ab"),
        ("\n\nUser: hi", ["\nUser:"], "\n"),
        ("xaaab", ["aab", "aaa"], "x"),
        ("no stop", [], "no stop"),
    ],
    ids=str,
)
def test_stop_strings_across_pieces(size: int, text: str, stops: list[str], shown: str) -> None:
    cut = StopFilter(stops)
    got = ""
    for start in range(0, len(text), size):
        got += cut.push(text[start : start + size])
        if cut.stopped:
            break
    assert got + cut.finish() == shown
    assert cut.stopped == (shown != text)


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    cut = StopFilter(["END"])
    assert [cut.push(piece) for piece in ("a", "E", "x", "EN", "E", "q")] == [
        "a", "", "Ex", "", "EN", "Eq",
    ]  # fmt: skip


MESSAGES = [{"role": "user", "content": "Hi & <bye>"}]


def test_chat_template_of_the_file(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat_prompt(MESSAGES) == (
        "<|im_start|>user\nHi & <bye><|im_end|>\n<|im_start|>assistant\n"
    )
    whole = tokenizer.chat_prompt(MESSAGES, add_generation_prompt=False)
    assert whole.endswith("<|im_end|>\n")


def with_template(directory: Path, out: Path, template: object) -> Tokenizer:
    shutil.copytree(directory, out)
    (out / "chat_template.jinja").unlink()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings |= {"chat_template": template, "bos_token": {"content": "<s>"}}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(out)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>Hi & <bye>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi & <bye>"}'),
        ("{% generation %}{{ messages|length }}{% endgeneration %}", "1"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{{ strftime_now('%Y')|length }}", "4"),
        ([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}], "d"),
    ],
    ids=["bos", "tojson", "generation", "loopcontrols", "strftime", "named"],
)
def test_chat_template_of_the_config(
    directory: Path, tmp_path: Path, template: object, prompt: str
) -> None:
    assert with_template(directory, tmp_path / "t", template).chat_prompt(MESSAGES) == prompt


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{% if %}", "refuses"),
        ("{{ 1 / 0 }}", "refuses these messages: division by zero"),
        ("{{ '%d' % 'x' }}", "refuses these messages: .*format"),
        ("{{ strftime_now('\\ud800') }}", "refuses these messages: .*surrogates"),
        ("{{ 'ab'.index('c') }}", "refuses these messages: substring not found"),
        ("{{ {}.popitem() }}", "refuses these messages"),
        ("{{ ['a'].pop(9) }}", "refuses these messages"),
        ("{{ '{0}'.format() }}", "refuses these messages: .*out of range"),
        (None, "no chat template"),
    ],
    ids=[
        "raised",
        "mutates",
        "escapes",
        "faulty",
        "divides",
        "type",
        "encoding",
        "value",
        "popitem",
        "pop",
        "lookup",
        "missing",
    ],
)
def test_chat_template_errors(directory: Path, tmp_path: Path, template: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        with_template(directory, tmp_path / "t", template).chat_prompt(MESSAGES)


def test_messages_need_role_and_content(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="message 0"):
        tokenizer.chat_prompt([{"role": "user"}])


@pytest.mark.parametrize("damage", [None, "{", '{"a": 1}'], ids=["missing", "cut", "foreign"])
def test_damaged_tokenizer_is_refused(tmp_path: Path, damage: str | None) -> None:
    if damage is not None:
        (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
