"""How good an adapter is at a task: by which answer is likelier, or by what it writes."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.adapters.tune.model import Tuned
from edgekit.data.tuning_tasks import LABELS, Example
from edgekit.mixers.base import State
from edgekit.runtime.text import Tokenizer

__all__ = [
    "NEW_TOKENS",
    "Scores",
    "edit_distance",
    "first_line",
    "graded",
    "greedy",
    "labelled",
    "read_examples",
    "score",
]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
BATCH = 32
NEW_TOKENS = 64  # the longest sentence to restore has 16 words


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a model makes of examples.

    Attributes:
        correct: of them.
        samples: how many there are.
        character_error_rate: edits by character of what was right, on average; None where the
            answer is chosen, not written.
        answers: id, answer, and whether it is right, of each.
    """

    correct: int
    samples: int
    character_error_rate: float | None
    answers: tuple[dict[str, Any], ...]


def score(task: str, model: Tuned, tokenizer: Tokenizer, examples: Sequence[Example]) -> Scores:
    """Measure a model at `sentiment` or `restore`.

    Sentiment: the one of two labels that is likelier after the prompt. Restore: the first line
    that greedy generation writes, which is right if it is the sentence, to the character.
    """
    model.eval()
    answer = _likeliest if task == "sentiment" else _written
    return graded(task, answer(model, tokenizer, [e.prompt for e in examples]), examples)


def graded(task: str, answers: Sequence[str], examples: Sequence[Example]) -> Scores:
    """What answers are worth, however they were found."""
    wanted = [example.completion.strip() for example in examples]
    right = [answer == reference for answer, reference in zip(answers, wanted, strict=True)]
    rates = [edit_distance(a, w) / max(1, len(w)) for a, w in zip(answers, wanted, strict=True)]
    return Scores(
        correct=sum(right),
        samples=len(examples),
        character_error_rate=None if task == "sentiment" else float(np.mean(rates)),
        answers=tuple(
            {"id": example.id, "answer": answer, "correct": correct}
            for example, answer, correct in zip(examples, answers, right, strict=True)
        ),
    )


def read_examples(path: Path, count: int | None = None) -> list[Example]:
    """The first `count` lines of a task's file; None: all of them."""
    # Not splitlines(), which takes more characters for the end of a line than JSON Lines does.
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Example(**json.loads(line)) for line in lines[:count]]


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements of characters that make `b` of `a` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@torch.inference_mode()
def greedy(
    model: Tuned,
    prompts: Sequence[Integers],
    *,
    new_tokens: int,
    decided: Callable[[list[int]], bool] = lambda answer: False,
) -> list[list[int]]:
    """The likeliest token again and again, until the model ends its answer.

    Args:
        model: with its adapter.
        prompts: ids `[T]` each; shorter ones are padded on the left, which changes no answer.
        new_tokens: at most.
        decided: whether more of an answer tells nothing new.

    Returns:
        The ids of each answer, without what ended it.
    """
    decoder, stops = model.decoder, set(model.decoder.config.eos_token_ids)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    state: list[State] | None = None
    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for _ in range(new_tokens):
        with model.autocast():
            hidden, state = decoder.hidden(ids, mask=mask, state=state)
            ids = decoder.lm_head(hidden[:, -1]).argmax(dim=-1)[:, None]
        mask = torch.cat((mask, mask.new_ones((len(prompts), 1))), dim=1)
        for row in sorted(going):
            token = int(ids[row])
            if token in stops:
                going.discard(row)
            else:
                answers[row].append(token)
                if decided(answers[row]):
                    going.discard(row)
        if not going:
            break
    return answers


def _written(model: Tuned, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
    """The first line of what the model writes after each prompt."""
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    texts = [""] * len(prompts)

    def decided(ids: list[int]) -> bool:
        return "\n" in tokenizer.decode(ids).lstrip()

    for batch in _batches([len(ids) for ids in encoded]):
        given = [encoded[i] for i in batch]
        found = greedy(model, given, new_tokens=NEW_TOKENS, decided=decided)
        for i, ids in zip(batch, found, strict=True):
            texts[i] = first_line(tokenizer.decode(ids))
    return texts


def first_line(text: str) -> str:
    """The answer in what was written."""
    return text.strip().partition("\n")[0].strip()


def _likeliest(model: Tuned, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
    """The label of larger log-probability for each prompt."""
    scores = np.empty((len(prompts), len(LABELS)))
    rows = [[labelled(tokenizer, prompt, text) for text in LABELS] for prompt in prompts]
    for batch in _batches([len(labels[0][0]) for labels in rows]):
        scores[batch] = _log_likelihoods(model, [rows[i] for i in batch])
    return [LABELS[i].strip() for i in scores.argmax(axis=1)]


def labelled(tokenizer: Tokenizer, prompt: str, label: str) -> tuple[Integers, int]:
    """Ids of both together, and where the label begins."""
    before, whole = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(prompt + label)
    common = min(len(before), len(whole))
    return whole, int(np.cumprod(before[:common] == whole[:common]).sum())


@torch.inference_mode()
def _log_likelihoods(model: Tuned, rows: Sequence[Sequence[tuple[Integers, int]]]) -> Floats:
    """Summed log-probability of what stands from the border on, `[prompts, labels]`.

    What is the same but for its last token is read once.
    """
    read = list(dict.fromkeys(tuple(ids[:-1]) for labels in rows for ids, _ in labels))
    place = {ids: row for row, ids in enumerate(read)}
    width = max(map(len, read))
    ids = torch.zeros((len(read), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, read_ids in enumerate(read):
        ids[row, : len(read_ids)] = torch.tensor(read_ids)
        mask[row, : len(read_ids)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    flat = [(whole, max(border, 1)) for labels in rows for whole, border in labels]
    with model.autocast():
        hidden, _ = model.decoder.hidden(ids, mask=mask)
        learnt = [hidden[place[tuple(w[:-1])], border - 1 : len(w) - 1] for w, border in flat]
        logits = model.decoder.lm_head(torch.cat(learnt)).float()
    wanted = torch.from_numpy(np.concatenate([whole[border:] for whole, border in flat]))
    found = logits.log_softmax(dim=-1).gather(1, wanted.to(model.device)[:, None])[:, 0]
    sums = [float(part.sum()) for part in found.cpu().split([len(part) for part in learnt])]
    return np.reshape(sums, (len(rows), -1))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows of like lengths, so that there is little padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]
