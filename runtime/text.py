"""Text to token ids and back, through the tokenizers library; no piece tears a character.

Nothing is added that `tokenizer.json` does not ask for: SmolLM2, for one, has no bos of its own.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from edgekit.errors import BundleError, UsageError
from edgekit.runtime import chat
from edgekit.runtime.engine import Integers

__all__ = ["Detokenizer", "StopFilter", "Tokenizer"]

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """The tokenizer of a bundle.

    Example:
        >>> tokenizer = Tokenizer(Path("bundle"))                   # doctest: +SKIP
        >>> tokenizer.decode(tokenizer.encode("Hello"))             # doctest: +SKIP
        'Hello'
    """

    def __init__(self, directory: Path | str) -> None:
        """Read `tokenizer.json`, and `tokenizer_config.json` if there is one.

        Raises:
            BundleError: if one of them is missing or cannot be read.
        """
        self._directory = Path(directory)
        path = self._directory / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{path}: missing; convert the model again")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as cause:  # the tokenizers library raises this very class
            raise BundleError(f"{path}: damaged ({cause}); convert again") from cause
        # What was set for training would cut or pad a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._settings = _read_json(self._directory / "tokenizer_config.json")
        self.special = _special_tokens(self._settings)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Integers:
        """Token ids `[T]` of `text`.

        Args:
            text: markers such as `<|im_start|>` become their own tokens.
            add_special_tokens: let tokenizer.json add what its post-processor says, often nothing.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return np.array(encoding.ids, dtype=np.int64)

    def encode_prompt(self, text: str) -> Integers:
        """Token ids `[T]` of a prompt: special tokens as usual, but never a second bos."""
        bos = self.special.get("bos_token")
        return self.encode(text, add_special_tokens=not (bos and text.startswith(bos)))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no character become U+FFFD."""
        text: str = self._tokenizer.decode(
            [int(token) for token in ids], skip_special_tokens=skip_special_tokens
        )
        return text

    def is_byte(self, token: int) -> bool:
        """Whether `token` is one byte of a character that the vocabulary lacks (`<0xE2>`)."""
        return bool(BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or ""))

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle says how a conversation becomes a prompt."""
        return self._chat_template() is not None

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the prompt that the model was trained on.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            add_generation_prompt: end with the opening of the assistant's answer.

        Raises:
            UsageError: if the model has no chat template, or the template refuses the messages.
        """
        template = self._chat_template()
        if template is None:
            raise UsageError(
                f"{self._directory}: the model has no chat template; give a plain prompt instead"
            )
        return chat.render(
            template, messages, self.special, add_generation_prompt=add_generation_prompt
        )

    def _chat_template(self) -> str | None:
        path = self._directory / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._settings.get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template}
            template = named.get("default")
        return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise BundleError(f"{path}: damaged ({cause}); convert again") from cause
    if not isinstance(data, dict):
        raise BundleError(f"{path}: damaged (not a table); convert again")
    return data


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    found = {name: settings.get(name) for name in SPECIAL_NAMES}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in found.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


class Detokenizer:
    """Turns tokens into text as they come; the pieces join to the decoding of all of them.

    A piece is held back while it ends inside a character. Only the last few tokens are decoded
    again for each new one: those of the piece before, whose text tells how they join.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # tokens of the last piece
        self._held: list[int] = []  # tokens since

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty inside a character."""
        self._held.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        piece = self._pending()
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        self._shown, self._held = self._held, []
        return piece

    def finish(self) -> str:
        """What was held back, with U+FFFD for a character that was never completed."""
        piece = self._pending()
        self._shown, self._held = [], []
        return piece

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


class StopFilter:
    """Ends a text at the first stop string, wherever pieces divide it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text that is certain to come before any stop string."""
        if not self._stops:
            return piece
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        cut = len(self._held) - max(self._overlap(stop) for stop in self._stops)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest beginning of `stop` that the held text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
