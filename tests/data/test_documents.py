import json
import re
from pathlib import Path

import pytest

from edgekit.data.documents import read_documents
from edgekit.errors import UsageError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_a_form_feed_parts_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\f\ntwo\f \f", encoding="utf-8-sig")
    assert [document.text for document in read_documents(path).documents] == ["one\n", "\ntwo"]


def test_lines_are_texts_or_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\u2028b", "id": 7}\n\n' + json.dumps({"messages": CHAT}) + "\r\n")
    text, chat = read_documents(path).documents
    assert text.text == "a\u2028b"
    assert chat.messages == tuple(CHAT)
    assert chat.where == f"{path}: line 3"


def test_lines_are_prompts_with_completions(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "prompt": "", "completion": " a"}\n')
    (pair,) = read_documents(path).documents
    assert (pair.prompt, pair.completion, pair.text) == ("", " a", "")


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"abc")
    assert read_documents(tmp_path / "a.md").sha256 == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", None, "cannot be read (No such file", id="missing"),
        pytest.param("a.txt", b"", "holds no text", id="empty"),
        pytest.param("a.txt", b" \n\f\n", "holds no text", id="blank"),
        pytest.param("a.txt", b"a\0b", "binary", id="nul"),
        pytest.param("a.txt", b"fine\nn\xff", "line 2 is not UTF-8", id="latin-1"),
        pytest.param("a.parquet", b"PAR1", "allowed are .txt, .md", id="kind"),
        pytest.param("a.jsonl", b"{}\n", "line 1: needs 'messages', 'prompt'", id="no-key"),
        pytest.param("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: not a JSON object", id="array"),
        pytest.param("a.jsonl", b'{"text": "a"}\n\n{"te', "line 3: not JSON", id="torn"),
        pytest.param("a.jsonl", b"[" * 10**5, "line 1: not JSON", id="deep"),
        pytest.param("a.jsonl", b'{"text": 3}', "'text' is 3", id="number"),
        pytest.param("a.jsonl", b'{"text": "\\ud83d"}', "half of a character", id="surrogate"),
        pytest.param(
            "a.jsonl", b'{"prompt": "a", "completion": ""}', "'completion' is empty", id="silent"
        ),
        pytest.param("a.jsonl", b'{"prompt": "a"}', "needs 'messages', 'prompt'", id="half-a-pair"),
        pytest.param("a.jsonl", b'{"messages": []}', "list of one or more", id="no-message"),
        pytest.param("a.jsonl", b'{"messages": ["a"]}', "needs a 'role'", id="no-role"),
        pytest.param(
            "a.jsonl",
            b'{"messages": [{"role": "human", "content": "a"}]}',
            "role 'human' given; allowed: system, user",
            id="role",
        ),
        pytest.param(
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": null}]}',
            "'content' is None",
            id="content",
        ),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read_documents(path)
    assert str(caught.value).startswith(str(path))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        read_documents(tmp_path / "a.txt")
