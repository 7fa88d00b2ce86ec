"""Scores against slow references: full logits for one prompt at a time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.adapters.tune.model import Base, Tuned, new_tuned, open_base
from edgekit.adapters.tune.recipe import Recipe
from edgekit.adapters.tune.scoring import edit_distance, greedy, score
from edgekit.data.tuning_tasks import LABELS, Example
from edgekit.runtime.text import Tokenizer
from edgekit.testing import write_tiny_student

PROMPTS = ["Once upon a time", "The", "def convert(source, out): return the number of", "12"]


@pytest.fixture(scope="module", params=["softmax", "student"])
def base(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Base:
    if request.param == "softmax":
        return open_base(checkpoint)
    folder = tmp_path_factory.mktemp("scoring") / "student"
    made = write_tiny_student(folder, checkpoint, ("lawcat", "softmax", "lawcat"))
    return open_base(checkpoint, made)


@pytest.fixture(scope="module")
def model(base: Base, small: Callable[..., Recipe]) -> Tuned:
    """With an adapter that says something."""
    made = new_tuned(base, small("lora"), "fp32")
    random = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return made.eval()


@torch.no_grad()
def one_by_one(model: Tuned, ids: np.ndarray, count: int) -> list[int]:
    """Greedy answer of one prompt, everything read again for each token."""
    whole = torch.from_numpy(ids)[None]
    for _ in range(count):
        logits, _ = model.decoder(whole)
        whole = torch.cat((whole, logits[:, -1:].argmax(dim=-1)), dim=1)
    return whole[0, len(ids) :].tolist()


def test_answers_side_by_side_are_those_of_each_alone(model: Tuned, checkpoint: Path) -> None:
    encoded = [Tokenizer(checkpoint).encode(prompt) for prompt in PROMPTS]
    found = greedy(model, encoded, new_tokens=12)
    for ids, answer in zip(encoded, found, strict=True):
        reference = one_by_one(model, ids, 12)
        stopped = reference.index(2) if 2 in reference else 12
        assert answer == reference[:stopped]


@torch.no_grad()
def test_the_likelier_label(model: Tuned, checkpoint: Path) -> None:
    tokenizer = Tokenizer(checkpoint)
    wanted = []
    for prompt in PROMPTS:
        sums = []
        for label in LABELS:
            ids = torch.from_numpy(tokenizer.encode(prompt + label))
            border = len(tokenizer.encode(prompt))
            log_p = model.decoder(ids[None])[0][0].log_softmax(dim=-1)
            sums.append(sum(float(log_p[i - 1, ids[i]]) for i in range(border, len(ids))))
        wanted.append(LABELS[int(np.argmax(sums))])
    examples = [Example(id=p, prompt=p, completion=w) for p, w in zip(PROMPTS, wanted, strict=True)]
    scores = score("sentiment", model, tokenizer, examples)
    assert (scores.correct, scores.samples, scores.character_error_rate) == (4, 4, None)
    flipped = [
        Example(id=e.id, prompt=e.prompt, completion=LABELS[e.completion == LABELS[0]])
        for e in examples
    ]
    assert score("sentiment", model, tokenizer, flipped).correct == 0


def test_what_is_written_is_compared_to_the_character(model: Tuned, checkpoint: Path) -> None:
    tokenizer = Tokenizer(checkpoint)
    answers = [tokenizer.decode(one_by_one(model, tokenizer.encode(p), 64)) for p in PROMPTS]
    lines = [answer.strip().partition("\n")[0].strip() for answer in answers]
    examples = [
        Example(id=p, prompt=p, completion=f" {line}")
        for p, line in zip(PROMPTS, lines, strict=True)
    ]
    scores = score("restore", model, tokenizer, examples)
    assert [a["answer"] for a in scores.answers] == lines
    assert (scores.correct, scores.character_error_rate) == (4, 0.0)
    wrong = [Example(id=e.id, prompt=e.prompt, completion=e.completion + "!") for e in examples]
    scores = score("restore", model, tokenizer, wrong)
    expected = np.mean([1 / (len(line) + 1) for line in lines])
    assert scores.correct == 0
    assert scores.character_error_rate == pytest.approx(expected)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance
