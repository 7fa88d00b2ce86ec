"""Documents to tokens, with which of them are to be learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgekit.data.documents import Document
from edgekit.errors import UsageError
from edgekit.runtime.text import Tokenizer

__all__ = ["ChatLoss", "Tokens", "completion", "tokenise"]

ChatLoss = Literal["assistant", "all"]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One document: ids int32 `[N]`, and bool `[N]`, True on what a model should predict."""

    ids: npt.NDArray[np.int32]
    learn: npt.NDArray[np.bool_]


def tokenise(document: Document, tokenizer: Tokenizer, *, eos: int, chat_loss: ChatLoss) -> Tokens:
    """A text with `eos` behind it, a conversation as the template renders it, or a completion.

    The first token is never learnt: nothing says what a document begins with.

    Args:
        document: text, conversation, or prompt and completion, of which the latter is learnt.
        tokenizer: with a chat template, if it is a conversation.
        eos: the id that ends a text, and an assistant's turn.
        chat_loss: `assistant` learns the assistant's turns, each up to its last `eos`; `all` learns
            every token.

    Raises:
        UsageError: naming the document, if the template refuses the conversation or, where only the
            assistant's turns are learnt, does not keep them apart.
    """
    if document.completion:
        return completion(document.prompt, document.completion, tokenizer, eos=eos)
    if not document.messages:
        ids = tokenizer.encode(document.text)
        ids = ids if ids[-1:] == eos else np.append(ids, eos)
        return _learnt(ids, [(0, len(ids))])
    try:
        whole = tokenizer.chat_prompt(document.messages, add_generation_prompt=False)
        ids = tokenizer.encode_prompt(whole)
        if chat_loss == "all":
            return _learnt(ids, [(0, len(ids))])
        turns = _assistant_turns(document.messages, whole, ids, tokenizer)
    except UsageError as cause:
        raise UsageError(f"{document.where}: {cause}") from cause
    return _learnt(ids, [(start, _end(ids, start, stop, eos)) for start, stop in turns])


def completion(prompt: str, answer: str, tokenizer: Tokenizer, *, eos: int) -> Tokens:
    """A prompt and its answer with `eos` behind it; the answer is what is to be learnt."""
    ids = np.append(tokenizer.encode_prompt(prompt + answer), eos)
    return _learnt(ids, [(_common(tokenizer.encode_prompt(prompt), ids), len(ids))])


def _learnt(ids: Integers, spans: Sequence[tuple[int, int]]) -> Tokens:
    learn = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in spans:
        learn[start:stop] = True
    learn[:1] = False
    return Tokens(ids.astype(np.int32), learn)


def _assistant_turns(
    messages: Sequence[dict[str, str]], whole: str, ids: Integers, tokenizer: Tokenizer
) -> list[tuple[int, int]]:
    """Where in `ids` each assistant's turn begins and ends, its opening left out."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.chat_prompt(messages[:turn], add_generation_prompt=True)
        after = tokenizer.chat_prompt(messages[: turn + 1], add_generation_prompt=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise UsageError(
                "the model's chat template renders a turn otherwise when others follow, so that "
                "the assistant's cannot be told apart; learn from all tokens instead"
            )
        # A token across the border holds text of the turn, and is learnt.
        spans.append(
            (
                _common(tokenizer.encode_prompt(before), ids),
                _common(tokenizer.encode_prompt(after), ids),
            )
        )
    if not spans:
        raise UsageError("the conversation has no turn of the assistant to learn from")
    return spans


def _end(ids: Integers, start: int, stop: int, eos: int) -> int:
    """Where the turn ends for a model that stops at `eos`: what the template adds is not its."""
    found = np.flatnonzero(ids[start:stop] == eos)
    return start + int(found[-1]) + 1 if len(found) else stop


def _common(a: Integers, b: Integers) -> int:
    """Length of the longest common beginning."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
