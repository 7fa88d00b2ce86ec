"""Text in, text out: greedy, batches, streaming, stop strings, beams, limits."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from edgekit.errors import UsageError
from edgekit.runtime import Model
from edgekit.runtime.beam import beam_search
from edgekit.runtime.generation import Generation
from edgekit.runtime.sampling import GenerationOptions

Loader = Callable[..., Model]
Reference = Callable[[str], Callable[..., np.ndarray]]
PROMPT = "The capital of France is"
PROMPTS = ["The capital", PROMPT, "Once upon a time there was a small model", "x"]


def greedy_ids(logits: Callable[..., np.ndarray], prompt: np.ndarray, count: int) -> list[int]:
    ids = prompt
    for _ in range(count):
        ids = np.append(ids, logits(ids[None])[0, -1].argmax())
    return ids[len(prompt) :].tolist()


def test_greedy_is_that_of_the_decoder(
    opened: Loader, reference: Reference, kind: str, engine: str
) -> None:
    model = opened(kind, engine)
    want = greedy_ids(reference(kind), model.tokenizer.encode(PROMPT), 10)
    text = model.generate(PROMPT, max_new_tokens=10, ignore_eos=True)
    assert text == model.tokenizer.decode(want)


def test_a_batch_gives_what_each_prompt_gives(opened: Loader, kind: str, engine: str) -> None:
    model = opened(kind, engine)
    together = model.generate(PROMPTS, max_new_tokens=24)
    assert together == [model.generate(prompt, max_new_tokens=24) for prompt in PROMPTS]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_model_that_answers_for_every_position_writes_the_same(
    opened: Loader, engine: str, settings: dict[str, int]
) -> None:
    texts = [
        opened("hybrid", engine, logits=logits).generate(PROMPTS, max_new_tokens=12, **settings)
        for logits in ("last", "all")
    ]
    assert texts[0] == texts[1]


def test_rows_of_a_batch_end_apart(opened: Loader, engine: str) -> None:
    model = opened("hybrid", engine)
    texts = model.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    stop = texts[1][2:4]
    cut = model.generate(PROMPTS, max_new_tokens=12, ignore_eos=True, stop=stop)
    assert cut == [text.split(stop)[0] for text in texts]
    assert cut[1] != texts[1]
    assert model.last_stats is not None
    assert model.last_stats.endings[1] == "stop string"


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 4}], ids=str)
def test_pieces_join_to_the_text(
    opened: Loader, kind: str, engine: str, settings: dict[str, float]
) -> None:
    model = opened(kind, engine)
    pieces = list(model.stream(PROMPT, max_new_tokens=40, **settings))
    whole = model.generate(PROMPT, max_new_tokens=40, **settings)
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    assert all(pieces)


def test_stop_string_ends_text_and_stream(opened: Loader, engine: str) -> None:
    model = opened("softmax", engine)
    settings = {"temperature": 1.5, "seed": 1, "ignore_eos": True, "max_new_tokens": 30}
    whole = model.generate(PROMPT, **settings)
    stop = whole[9:13]
    cut = model.generate(PROMPT, stop=["never this", stop], **settings)
    assert cut == whole[: whole.index(stop)]
    assert "".join(model.stream(PROMPT, stop=stop, **settings)) == cut
    assert model.last_stats is not None
    assert model.last_stats.endings == ("stop string",)


def test_seeds(opened: Loader, engine: str) -> None:
    model = opened("q_head", engine)
    settings = {"temperature": 2.0, "max_new_tokens": 20}
    first = model.generate(PROMPT, seed=1, **settings)
    assert model.generate(PROMPT, seed=1, **settings) == first
    assert model.generate(PROMPT, seed=2, **settings) != first
    pair = model.generate([PROMPT, PROMPT], seed=1, **settings)
    assert pair[0] == first
    assert pair[1] != first


def test_end_of_text_token_ends_it(opened: Loader, reference: Reference, engine: str) -> None:
    """With sampling at a high temperature the tiny model soon draws its eos."""
    model = opened("softmax", engine)
    for seed in range(20):
        settings = {"temperature": 50.0, "seed": seed, "max_new_tokens": 200}
        ended = model.generate(PROMPT, **settings)
        stats = model.last_stats
        assert stats is not None
        if stats.endings == ("end of text",):
            break
    assert stats.endings == ("end of text",)
    on = model.generate(PROMPT, ignore_eos=True, **settings)
    assert on.startswith(ended)
    assert model.last_stats.new_tokens == 200


def test_stats(opened: Loader, engine: str) -> None:
    model = opened("kv_head", engine)
    stream = model.stream(PROMPT, max_new_tokens=8, ignore_eos=True)
    list(stream)
    stats = model.last_stats
    assert stats is not None
    assert stats.prompt_tokens == len(model.tokenizer.encode(PROMPT))
    assert stats.new_tokens == 8
    assert stats.ttft_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.tokens_per_second == pytest.approx(7 / stats.decode_seconds)
    assert stats.endings == ("max_new_tokens",)


def test_generation_stops_at_the_context(opened: Loader, engine: str) -> None:
    model = opened("softmax", engine)
    prompt = "a" * 500
    room = 512 - len(model.tokenizer.encode(prompt))
    text = model.generate(prompt, max_new_tokens=100, ignore_eos=True)
    assert model.last_stats is not None
    assert model.last_stats.endings == ("context full",)
    assert model.last_stats.new_tokens == room + 1  # the last one need not be read back
    assert text
    beams = model.generate(prompt, max_new_tokens=100, ignore_eos=True, num_beams=2)
    assert beams
    assert model.last_stats.new_tokens == room + 1
    assert model.last_stats.endings == ("context full",)


def test_a_full_row_does_not_end_the_others(opened: Loader, engine: str) -> None:
    model = opened("hybrid", engine)
    long = "x" * 600
    while len(model.tokenizer.encode(long)) > 508:
        long = long[:-1]
    settings = {"max_new_tokens": 40, "ignore_eos": True}
    together = model.generate([PROMPT, long], **settings)
    assert model.last_stats is not None
    assert model.last_stats.endings == ("max_new_tokens", "context full")
    assert together == [model.generate(prompt, **settings) for prompt in (PROMPT, long)]


def test_a_prompt_longer_than_the_context_is_refused(opened: Loader, engine: str) -> None:
    with pytest.raises(UsageError, match="at most 512"):
        opened("hybrid", engine).generate("a" * 600)
    assert opened("q_head", engine).generate("a" * 600, max_new_tokens=1) is not None


def test_wrong_calls_are_refused_before_anything_runs(opened: Loader, engine: str) -> None:
    model = opened("q_head", engine)
    with pytest.raises(UsageError, match="temprature"):
        model.stream(PROMPT, temprature=1.0)
    with pytest.raises(UsageError, match="cannot stream"):
        model.stream(PROMPT, num_beams=2)
    with pytest.raises(UsageError, match="empty prompt"):
        model.generate("")
    with pytest.raises(UsageError, match="no prompt"):
        model.generate([])


Beams = Callable[..., list[int]]


@pytest.fixture(scope="module")
def transformers_beams(tiny_checkpoint: Callable[..., Path]) -> Beams:
    """New tokens `transformers` finds, its final end and padding tokens left out."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()

    @functools.cache
    def search(
        seed: int, ends: tuple[int, ...], settings: tuple[tuple[str, float], ...]
    ) -> list[int]:
        output = model.generate(
            torch.from_numpy(beam_prompt(seed))[None],
            attention_mask=torch.ones(1, 6, dtype=torch.long),
            do_sample=False,
            early_stopping=False,
            length_penalty=1.0,
            eos_token_id=list(ends) or 319_000,
            pad_token_id=0,
            **dict(settings),
        )
        tokens = output[0, 6:].tolist()
        while tokens and tokens[-1] in (*ends, 0):
            tokens.pop()
        return tokens

    return search


def beam_prompt(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 320, 6)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "max_new_tokens": 12},
        {"num_beams": 2, "max_new_tokens": 30},
        {"num_beams": 5, "max_new_tokens": 1},
        {"num_beams": 4, "max_new_tokens": 20, "repetition_penalty": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("ends", [(2,), tuple(range(2, 320, 8)), ()], ids=["eos", "many", "none"])
def test_beams_are_those_of_transformers(
    opened: Loader,
    transformers_beams: Beams,
    engine: str,
    settings: dict[str, float],
    ends: tuple[int, ...],
) -> None:
    model = opened("softmax", engine)
    for seed in range(4):
        found = beam_search(model.session(), beam_prompt(seed), GenerationOptions(**settings), ends)
        assert found.tokens == transformers_beams(seed, ends, tuple(settings.items()))


@pytest.mark.parametrize("kept", ["q_head", "kv_head", "hybrid"])
def test_beams_of_recurrent_models(
    opened: Loader, reference: Reference, engine: str, kept: str
) -> None:
    """The state follows its beam: the score of the found text is what the decoder gives it."""
    model = opened(kept, engine)
    prompt = model.tokenizer.encode(PROMPT)
    options = GenerationOptions(num_beams=4, max_new_tokens=8)
    found = beam_search(model.session(), prompt, options, ())
    assert found.tokens == _naive_beams(reference(kept), prompt, 4, 8)


def _naive_beams(
    logits: Callable[..., np.ndarray], prompt: np.ndarray, width: int, count: int
) -> list[int]:
    """Beam search that computes every sequence from scratch."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(count):
        sequences = np.stack([np.append(prompt, tokens).astype(np.int64) for _, tokens in beams])
        scores = torch.from_numpy(logits(sequences)[:, -1]).log_softmax(-1).numpy()
        longer = [
            (score + scores[i, token], [*tokens, int(token)])
            for i, (score, tokens) in enumerate(beams)
            for token in np.argsort(-scores[i])[:width]
        ]
        beams = sorted(longer, key=lambda beam: -beam[0])[:width]
    return beams[0][1]


def test_beam_search_through_generate(opened: Loader, engine: str) -> None:
    model = opened("hybrid", engine)
    single = model.generate(PROMPT, num_beams=3, max_new_tokens=10)
    assert model.generate([PROMPT, "x"], num_beams=3, max_new_tokens=10)[0] == single
    assert model.generate(PROMPT, num_beams=1, max_new_tokens=10) == model.generate(
        PROMPT, max_new_tokens=10
    )
    found = model.generate(PROMPT, num_beams=3, max_new_tokens=10, stop=single[3:5])
    assert found == single[: single.index(single[3:5])]


@pytest.mark.parametrize(
    ("ends", "count", "ending"),
    [((), 6, "max_new_tokens"), (tuple(range(2, 320, 2)), 200, "end of text")],
    ids=["all", "ended"],
)
def test_stats_of_beam_search(
    opened: Loader, engine: str, ends: tuple[int, ...], count: int, ending: str
) -> None:
    model = opened("q_head", engine)
    options = GenerationOptions(num_beams=3, max_new_tokens=count)
    prompt = model.tokenizer.encode(PROMPT)
    generation = Generation(model.session(), model.tokenizer, [prompt], options, ends, 320)
    generation.best_beam()
    stats = generation.stats
    assert stats is not None
    assert stats.endings == (ending,)
    found = beam_search(model.session(), prompt, options, ends)
    assert stats.new_tokens == len(found.tokens) + (ending == "end of text")
    assert stats.ttft_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.tokens_per_second == pytest.approx((stats.new_tokens - 1) / stats.decode_seconds)


def test_chat_prompt(opened: Loader, engine: str) -> None:
    model = opened("q_head", engine)
    prompt = model.chat_prompt([{"role": "user", "content": "Hi"}])
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.encode(prompt).tolist().count(1) == 2
    assert isinstance(model.generate(prompt, max_new_tokens=2), str)
