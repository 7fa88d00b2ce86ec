"""`onnxruntime_genai.Model` on our bundles, and what that library does not do with them."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.runtime import Model

pytestmark = pytest.mark.peer

END = 2  # ends a text in every bundle here; the library cannot be told to go on
RECURRENT = ("q_head", "kv_head", "hybrid")
Generator = Callable[..., Any]


@pytest.fixture(scope="module")
def generator(bundle: Callable[[str], Path]) -> Generator:
    """`generator("hybrid", ends=(7,), batch_size=2)`; 7 ends a text too."""
    genai = importlib.import_module("onnxruntime_genai")
    made: dict[tuple[str, str], Any] = {}

    def make(name: str, ends: tuple[int, ...] = (), **search: Any) -> Any:
        overlay = json.dumps({"model": {"eos_token_id": ends}})
        if (name, overlay) not in made:
            config = genai.Config(str(bundle(name)))
            config.overlay(overlay)
            made[name, overlay] = genai.Model(config)
        params = genai.GeneratorParams(made[name, overlay])
        params.set_search_options(max_length=80, **search)
        return genai.Generator(made[name, overlay], params)

    return make


def append(generator: Any, *rows: Any) -> None:
    generator.append_tokens(np.stack(rows).astype(np.int32))


def advance(generator: Any, count: int, row: int = 0) -> list[int]:
    """Generate, and return the last `count` tokens of a row."""
    for _ in range(count):
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(row)[-count:]]


def same_logits(running: Any, ours: Model, ids: np.ndarray) -> None:
    """The generator has read `ids`, no more and no less."""
    expected = ours.session().append(ids)
    np.testing.assert_allclose(running.get_output("last_logits")[:, -1], expected, atol=1e-4)


def test_greedy_tokens_are_ours_and_rewinding_starts_anew(
    bundle_name: str, generator: Generator, greedy: Any, prompt_of: Any
) -> None:
    prompt = prompt_of(bundle_name)
    (expected,) = greedy(bundle_name, "onnx", [prompt])
    assert END not in expected
    running = generator(bundle_name)
    append(running, prompt)
    assert advance(running, 32) == expected
    running.rewind_to(0)
    append(running, prompt)
    assert advance(running, 32) == expected


def test_prompt_in_two_pieces(kind: str, generator: Generator, greedy: Any, prompts: Any) -> None:
    running = generator(kind)
    append(running, prompts[1])
    append(running, prompts[0])
    assert [advance(running, 20)] == greedy(kind, "onnx", [np.concatenate(prompts[::-1])], 20)


def test_next_turn_after_the_end_of_a_text(
    kind: str, generator: Generator, opened: Any, greedy: Any, prompts: Any
) -> None:
    ((first, *rest),) = greedy(kind, "onnx", prompts[:1])
    end = next(token for token in rest if token != first)
    said = [first, *rest[: rest.index(end)]]
    running = generator(kind, ends=(end,))
    append(running, prompts[0])
    while not running.is_done():
        running.generate_next_token()
    assert running.get_sequence(0)[len(prompts[0]) :].tolist() == said
    append(running, prompts[1])
    so_far = np.concatenate((prompts[0], said, prompts[1]))
    same_logits(running, opened(kind, "onnx"), so_far)


@pytest.mark.parametrize("recurrent", ["q_head", "kv_head"])
def test_appending_amid_a_text_forgets_its_last_token(
    recurrent: str, generator: Generator, opened: Any, greedy: Any, prompts: Any
) -> None:
    """Gap of onnxruntime-genai: it takes the last token for an end of text, and never runs it."""
    (answer,) = greedy(recurrent, "onnx", prompts[1:])
    running = generator(recurrent)
    append(running, prompts[1])
    advance(running, 5)
    append(running, prompts[0])
    without = np.concatenate((prompts[1], answer[:4], prompts[0]))
    same_logits(running, opened(recurrent, "onnx"), without)


def test_rewinding_into_a_softmax_text(generator: Generator, greedy: Any, prompts: Any) -> None:
    running = generator("softmax")
    append(running, prompts[1])
    advance(running, 5)
    running.rewind_to(10)
    append(running, prompts[1][10:])
    assert [advance(running, 32)] == greedy("softmax", "onnx", prompts[1:])


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_rewinding_into_a_recurrent_text_is_refused(
    recurrent: str, generator: Generator, prompts: Any
) -> None:
    """Gap of onnxruntime-genai: a recurrent state has no past to go back to."""
    running = generator(recurrent)
    append(running, prompts[1])
    advance(running, 5)
    with pytest.raises(RuntimeError, match="cannot be partially rewound"):
        running.rewind_to(10)


def test_batch_of_equal_lengths(kind: str, generator: Generator, greedy: Any, prompts: Any) -> None:
    rows = [prompts[1], prompts[1][::-1]]
    running = generator(kind, batch_size=2)
    append(running, *rows)
    advance(running, 20)
    found = [running.get_sequence(i)[21:].tolist() for i in (0, 1)]
    assert found == greedy(kind, "onnx", rows, 20)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_of_other_lengths_is_wrong_in_its_short_row(
    kind: str, side: str, generator: Generator, greedy: Any, prompts: Any
) -> None:
    """Gap: its mask knows padding on the right alone, and ours is a left-padded graph."""
    padding = np.full(12, 2)  # pad_token_id
    short = (padding, prompts[0]) if side == "left" else (prompts[0], padding)
    running = generator(kind, batch_size=2)
    append(running, np.concatenate(short), prompts[1])
    advance(running, 20)
    found = [running.get_sequence(i)[21:].tolist() for i in (0, 1)]
    expected = greedy(kind, "onnx", prompts, 20)
    assert found[1] == expected[1]
    assert found[0] != expected[0]


def test_beam_search_of_softmax(generator: Generator, beams: Any, prompts: Any) -> None:
    assert beam_found(generator("softmax", num_beams=3), prompts[1]) == beams(
        "softmax", "onnx", prompts[1]
    )


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_beam_search_of_recurrent_layers_is_wrong(
    recurrent: str, generator: Generator, beams: Any, prompts: Any
) -> None:
    """Gap of onnxruntime-genai: it does not reorder recurrent states with the beams."""
    found = beam_found(generator(recurrent, num_beams=3), prompts[1])
    assert len(found) == 24
    assert found != beams(recurrent, "onnx", prompts[1])


def beam_found(running: Any, prompt: np.ndarray) -> list[int]:
    append(running, prompt)
    return advance(running, 24)
