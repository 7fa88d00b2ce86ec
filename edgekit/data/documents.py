"""Files of text and of conversations, read whole and checked line by line."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError

__all__ = [
    "DATASETS",
    "Document",
    "Origin",
    "parsed",
    "plain_name",
    "read_documents",
    "times_given",
]

TEXT_ENDINGS = (".txt", ".md", ".rst")
DATASETS = "datasets:"
ROLES = ("system", "user", "assistant", "tool")
FORM_FEED = "\f"  # parts the documents of a text file
TIMES = re.compile(r"@[0-9]+$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text, one conversation, or one prompt with its completion.

    Attributes:
        where: file and line, for errors.
        text: of a text; empty otherwise.
        messages: `{"role": ..., "content": ...}` each; empty where it is no conversation.
        prompt: what stands before the completion; may be empty.
        completion: what is to be learnt; empty where there is no such pair.
    """

    where: str
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""
    completion: str = ""

    @property
    def says_something(self) -> bool:
        """Whether there is anything in it to learn from."""
        return bool(self.messages or self.completion or self.text.strip())


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A file or data set, with the sha256 (hex) of its bytes or of its rows as JSON."""

    name: str
    sha256: str
    documents: tuple[Document, ...]


def plain_name(spec: str | Path) -> str:
    """`spec` without the `@N` that says how often an epoch holds it."""
    return TIMES.sub("", str(spec))


def times_given(specs: Sequence[str | Path]) -> dict[str, int]:
    """How often an epoch holds each file: `FILE@3` three times, `FILE` once, and repeats add up.

    Raises:
        UsageError: for `FILE@0`.
    """
    times: dict[str, int] = {}
    for spec in map(str, specs):
        name = plain_name(spec)
        count = int(spec[len(name) + 1 :] or 1)
        if count < 1:
            raise UsageError(f"{spec} given; allowed after @: 1 or more, how often an epoch has it")
        times[name] = times.get(name, 0) + count
    return times


def read_documents(spec: str | Path) -> Origin:
    """Read a `.txt`, `.md`, `.rst` or `.jsonl` file, or `datasets:ID[:SPLIT]`.

    A form feed parts the documents of a text file. Each line of a JSONL file is
    `{"messages": [{"role", "content"}, ...]}`, `{"prompt": ..., "completion": ...}` or
    `{"text": ...}`; other keys are left alone.

    Raises:
        UsageError: if it is missing, empty, binary, or malformed; it names file and line.
    """
    if str(spec).startswith(DATASETS):
        from edgekit.data.hub import read_dataset

        return read_dataset(str(spec))
    path = Path(spec)
    data = _bytes(path)
    text = _decoded(data, path)
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        found = [_line(line, f"{path}: line {number}") for number, line in lines if line.strip()]
    else:
        found = [Document(where=str(path), text=part) for part in text.split(FORM_FEED)]
    documents = tuple(document for document in found if document.says_something)
    if not documents:
        raise UsageError(f"{path}: holds no text; leave it out")
    return Origin(name=path.name, sha256=hashlib.sha256(data).hexdigest(), documents=documents)


def parsed(record: Mapping[str, Any], where: str) -> Document:
    """The document in a record with `messages`, with `prompt` and `completion`, or with `text`.

    Raises:
        UsageError: naming `where`, if it has none of them or is malformed.
    """
    if "messages" in record:
        return Document(where=where, messages=tuple(_messages(record["messages"], where)))
    if {"prompt", "completion"} <= set(record):
        prompt, answer = (_text(record[key], key, where) for key in ("prompt", "completion"))
        if not answer:
            raise UsageError(f"{where}: 'completion' is empty; needs what is to be learnt")
        return Document(where=where, prompt=prompt, completion=answer)
    if "text" in record:
        return Document(where=where, text=_text(record["text"], "text", where))
    keys = ", ".join(record) or "none"
    raise UsageError(
        f"{where}: needs 'messages', 'prompt' and 'completion', or 'text'; its keys are: {keys}"
    )


def _bytes(path: Path) -> bytes:
    if path.suffix not in (*TEXT_ENDINGS, ".jsonl"):
        allowed = ", ".join((*TEXT_ENDINGS, ".jsonl"))
        raise UsageError(f"{path}: allowed are {allowed}, or {DATASETS}ID[:SPLIT]")
    try:
        return path.read_bytes()
    except OSError as cause:
        raise UsageError(f"{path}: cannot be read ({cause.strerror})") from cause


def _decoded(data: bytes, path: Path) -> str:
    if b"\0" in data:
        raise UsageError(f"{path}: binary (it holds NUL bytes); give text in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise UsageError(f"{path}: line {line} is not UTF-8; convert the file first") from cause


def _line(line: str, where: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as cause:
        raise UsageError(f"{where}: not JSON ({cause})") from cause
    if not isinstance(record, dict):
        raise UsageError(f"{where}: not a JSON object")
    return parsed(record, where)


def _messages(value: Any, where: str) -> Iterator[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: 'messages' is {value!r:.60}; needs a list of one or more")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UsageError(f"{where}: message {message!r:.60} needs a 'role' and a 'content'")
        if message["role"] not in ROLES:
            allowed = ", ".join(ROLES)
            raise UsageError(f"{where}: role {message['role']!r:.60} given; allowed: {allowed}")
        yield {"role": message["role"], "content": _text(message["content"], "content", where)}


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: '{key}' is {value!r:.60}; needs a string")
    try:
        value.encode()
    except UnicodeEncodeError as cause:  # half of a \ud83d\ude00
        raise UsageError(f"{where}: '{key}' holds half of a character ({cause.reason})") from cause
    return value
