"""Greedy answers to a batch of prompts."""

from collections.abc import Callable, Sequence

import numpy as np

from edgekit.eval.reader import Integers, Reader

__all__ = ["greedy_answers"]


def greedy_answers(
    reader: Reader,
    prompts: Sequence[Integers],
    *,
    max_new_tokens: int,
    decided: Callable[[int, str], bool],
) -> list[str]:
    """Continue prompts side by side, each with its most likely token.

    A shorter prompt is padded on its left, which changes no answer. An answer ends at a stop token,
    when it is decided, or after `max_new_tokens`.

    Args:
        reader: opened with logits="last".
        prompts: token ids `[T]` each; lengths may differ.
        max_new_tokens: of each answer.
        decided: given a row's number and its answer so far, whether more of it tells nothing new.

    Returns:
        The text of each answer, without the prompt.
    """
    ids, mask = _padded(prompts)
    reading = reader.start(len(prompts))
    logits = reading.append(ids, mask)
    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step in range(max_new_tokens):
        tokens = logits.argmax(axis=1)
        for row in sorted(going):
            stopped = int(tokens[row]) in reader.stops
            answers[row] += [] if stopped else [int(tokens[row])]
            if stopped or decided(row, reader.tokenizer.decode(answers[row])):
                going.discard(row)
        if not going or step == max_new_tokens - 1:
            break
        logits = reading.append(tokens[:, None])
    return [reader.tokenizer.decode(answer) for answer in answers]


def _padded(prompts: Sequence[Integers]) -> tuple[Integers, Integers | None]:
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, None if mask.all() else mask
