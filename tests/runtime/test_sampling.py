"""Choice of the next token, against transformers' own processors."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from edgekit.errors import UsageError
from edgekit.runtime.sampling import (
    GenerationOptions,
    GenerationSettings,
    Sampler,
    candidates,
    penalise,
)

NO_PROMPT = np.array([], dtype=np.int64)


@pytest.fixture(params=[40, 5000], ids=["V40", "V5000"])
def logits(request: pytest.FixtureRequest) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 2.5, request.param).astype(np.float32)


def expected(logits: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """Probabilities `[V]` after transformers' warpers, in its order."""
    scores = torch.from_numpy(logits)[None].double()
    steps = [logits_process.TemperatureLogitsWarper(options.temperature)]
    if options.top_k:
        steps.append(logits_process.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(logits_process.TopPLogitsWarper(options.top_p))
    if options.min_p:
        steps.append(logits_process.MinPLogitsWarper(options.min_p))
    for step in steps:
        scores = step(torch.zeros(1, 1, dtype=torch.long), scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.0, "top_k": 100000},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.7, "top_p": 0.999},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_candidates_are_those_of_transformers(
    logits: np.ndarray, settings: GenerationSettings
) -> None:
    options = GenerationOptions.of(settings)
    tokens, probabilities = candidates(logits, options)
    got = np.zeros(len(logits))
    got[tokens] = probabilities
    np.testing.assert_allclose(got, expected(logits, options), atol=1e-12)
    assert (np.diff(probabilities) <= 0).all(), "likeliest first"


def test_repetition_penalty_is_that_of_transformers(logits: np.ndarray) -> None:
    prompt = np.array([1, 5, 5, 30])
    processor = logits_process.RepetitionPenaltyLogitsProcessor(1.7)
    want = processor(torch.from_numpy(prompt)[None], torch.from_numpy(logits)[None])[0].numpy()
    seen = np.zeros(len(logits), dtype=bool)
    seen[prompt] = True
    np.testing.assert_allclose(penalise(logits, seen, 1.7), want, rtol=1e-6)


def test_greedy_takes_the_largest_and_penalty_moves_it_on() -> None:
    logits = np.array([0.0, 3.0, 2.9, -1.0], dtype=np.float32)
    before = logits.copy()
    plain = Sampler(GenerationOptions(), NO_PROMPT, 4, 0)
    assert [plain(logits) for _ in range(3)] == [1, 1, 1]
    penalised = Sampler(GenerationOptions(repetition_penalty=2.0), NO_PROMPT, 4, 0)
    assert [penalised(logits) for _ in range(3)] == [1, 2, 1]
    np.testing.assert_array_equal(logits, before)


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampler = Sampler(GenerationOptions(temperature=1.0, seed=1), NO_PROMPT, 4, 0)
    share = np.bincount([sampler(logits) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def draws(seed: int | None, row: int, logits: np.ndarray) -> list[int]:
    sampler = Sampler(GenerationOptions(temperature=1.5, seed=seed), NO_PROMPT, len(logits), row)
    return [sampler(logits) for _ in range(30)]


def test_a_seed_repeats_and_rows_differ(logits: np.ndarray) -> None:
    assert draws(5, 0, logits) == draws(5, 0, logits)
    assert draws(5, 0, logits) != draws(6, 0, logits)
    assert draws(5, 0, logits) != draws(5, 1, logits)
    assert draws(None, 0, logits) != draws(None, 0, logits)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 2.0}, "whole number"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "temperature": 0.5}, "does not sample"),
        ({"temprature": 0.5}, "unknown; known: max_new_tokens"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(settings: GenerationSettings, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        GenerationOptions.of(settings)


def test_one_stop_string_may_stand_alone() -> None:
    assert GenerationOptions.of({"stop": "END"}).stop == ("END",)


def test_keyword_arguments_and_fields_agree() -> None:
    fields = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert fields == set(GenerationSettings.__annotations__)
