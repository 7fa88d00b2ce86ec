"""How far a model looks at its pictures, by session, by stream and by the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgekit.bundle import read_manifest
from edgekit.cli.main import main
from edgekit.errors import UsageError
from edgekit.export.pipeline import convert
from edgekit.models.spin import SpinConfig
from edgekit.runtime import Model, ScoredPiece, load
from edgekit.runtime.generation import left_padded
from edgekit.runtime.text import Detokenizer, StopFilter
from edgekit.sources import open_source
from edgekit.sources.picture_model import open_picture_model
from edgekit.spin import apply
from edgekit.testing_vlm import write_tiny_vlm

SPIN = SpinConfig(suppress=1, alpha=0.0)
WATCHED = SpinConfig(suppress=0)
KINDS: dict[str, dict[str, Any]] = {
    "spin": {"spin": SPIN, "spin_scores": True},
    "watched": {"spin_scores": True},
    "unwatched": {"spin": SPIN},
    "portable": {"spin": SPIN, "spin_scores": True, "formats": ("onnx",), "onnx_ops": "portable"},
    "hybrid": {"spin": SPIN, "spin_scores": True, "mixer": "lawcat", "softmax_layers": (1,)},
}
PROMPT, OTHER = "The capital of France", "Once upon a time there was a small model"
NEW_TOKENS = 10
MAX_ABS = 1e-4
Bundles = Callable[[str], Path]
LONG: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vlm") / "source"
    write_tiny_vlm(out, "llava-gqa")
    return out


@pytest.fixture(scope="module")
def seeing(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """`seeing("spin")` is a bundle, made once; read-only."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("bundles") / kind
            options = {"weights": "fp32", "target": "generic-x86", "verify": False, **KINDS[kind]}
            convert(source, made[kind], **options)
        return made[kind]

    return make


def picture(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(values)


def first_masses(model: Model) -> tuple[list[float], list[int]]:
    """By a session: what comes with each greedy token, and the tokens."""
    (ids,), seen = model._prompts([PROMPT], [[picture()]])
    assert seen is not None
    session, masses, tokens = model.session(), [], []
    logits = session.append(ids, pictures=model.look(seen))
    for _ in range(NEW_TOKENS):
        assert session.image_mass is not None
        assert session.image_mass.shape == (1,)
        masses.append(float(session.image_mass[0]))
        tokens.append(int(logits[0].argmax()))
        logits = session.append(tokens[-1:])
    return masses, tokens


@torch.no_grad()
def transformers_says(source: Path, spin: SpinConfig, tokens: list[int]) -> list[float]:
    """Its heads' mean share of attention, at the end of the prompt and at tokens but the last."""
    vlm = open_picture_model(open_source(source))
    inputs = vlm.inputs(PROMPT, [picture()])
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([tokens[:-1]])), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    layers: list[torch.Tensor] = []

    def observe(_layer: int, scores: torch.Tensor, _gate: torch.Tensor) -> None:
        layers.append(scores[0].mean(dim=1))

    with apply(vlm.model, spin) as at_work, at_work.observed(observe):
        vlm.model(**inputs)
    assert len(layers) == 2
    return torch.stack(layers).mean(dim=0)[prompt - 1 :].tolist()  # type: ignore[no-any-return]


def piece_masses(model: Model, *stops: str) -> list[list[float]]:
    """The masses of the tokens of each piece of text; no stop string may come."""
    detokenizer, stop = Detokenizer(model.tokenizer), StopFilter(stops)
    groups: list[list[float]] = [[]]
    for mass, token in zip(*first_masses(model), strict=True):
        groups[-1].append(mass)
        if stop.push(detokenizer.push(token)):
            groups.append([])
    rest = stop.push(detokenizer.finish()) + stop.finish()
    return [masses for masses in (groups if rest else groups[:-1]) if masses]


@pytest.mark.parametrize(("name", "spin"), [("spin", SPIN), ("watched", WATCHED)])
def test_session_says_what_transformers_says(
    source: Path, seeing: Bundles, engine: str, name: str, spin: SpinConfig
) -> None:
    masses, tokens = first_masses(load(seeing(name), engine=engine))
    expected = transformers_says(source, spin, tokens)
    assert np.ptp(expected) > 100 * MAX_ABS
    np.testing.assert_allclose(masses, expected, atol=MAX_ABS)


def test_other_graphs_say_it_too(source: Path, seeing: Bundles) -> None:
    masses, tokens = first_masses(load(seeing("portable")))
    np.testing.assert_allclose(masses, transformers_says(source, SPIN, tokens), atol=MAX_ABS)
    both = [first_masses(load(seeing("hybrid"), engine=name))[0] for name in ("openvino", "onnx")]
    np.testing.assert_allclose(*both, atol=MAX_ABS)
    assert min(both[0]) > 0


def test_rows_beside_each_other(seeing: Bundles, engine: str) -> None:
    """Padded, in two calls, and reordered: each has what it has alone; without a picture, 0."""
    model = load(seeing("spin"), engine=engine)
    given = [[picture(1)], [], [picture(2), picture(3)]]
    prompts, seen = model._prompts([PROMPT, OTHER, "a"], given)
    assert seen is not None
    session = model.session(3)
    assert session.image_mass is None
    session.append(*left_padded(prompts), pictures=model.look(seen))
    session.append([[5, 6], [7, 8], [9, 10]])
    together = session.image_mass
    assert together is not None
    assert together[1] == 0
    for row, (ids, pictures) in enumerate(zip(prompts, given, strict=True)):
        alone = model.session()
        alone.append(ids, pictures=model.look(pictures) if pictures else None)
        alone.append([5 + 2 * row, 6 + 2 * row])
        assert alone.image_mass is not None
        assert abs(alone.image_mass[0] - together[row]) <= MAX_ABS
    here = session.snapshot()
    session.reorder([2, 0])
    np.testing.assert_array_equal(session.image_mass, together[[2, 0]])
    session.reorder([0, 0, 0])
    session.restore(here)
    assert session.image_mass is None
    session.append([[1], [1], [1]])
    assert session.image_mass is not None
    session.reset()
    assert session.image_mass is None


def test_every_position_is_asked_for(seeing: Bundles, engine: str) -> None:
    """The mass is that of the last position all the same."""
    model, whole = (load(seeing("spin"), engine=engine, logits=which) for which in ("last", "all"))
    (ids,), seen = model._prompts([PROMPT], [[picture()]])
    assert seen is not None
    sessions = [model.session(), whole.session()]
    for session in sessions:
        session.append(ids, pictures=model.look(seen))
    np.testing.assert_allclose(*[session.image_mass for session in sessions], atol=1e-6)


def test_stream_with_scores(seeing: Bundles, engine: str) -> None:
    model = load(seeing("spin"), engine=engine)
    images = [picture()]
    pieces = list(model.stream(PROMPT, images=images, with_scores=True, **LONG))
    assert "".join(p.text for p in pieces) == model.generate(PROMPT, images=images, **LONG)
    assert [p.text for p in pieces] == list(model.stream(PROMPT, images=images, **LONG))
    assert all(isinstance(piece, ScoredPiece) for piece in pieces)
    groups = piece_masses(model)
    assert max(map(len, groups)) > 1 == min(map(len, groups)), "some pieces have several tokens"
    wanted = [np.mean(masses) for masses in groups]
    assert [piece.image_mass for piece in pieces] == pytest.approx(wanted)
    without = list(model.stream(PROMPT, with_scores=True, **LONG))
    assert without
    assert all(piece.image_mass is None for piece in without)


def test_piece_of_several_tokens_has_their_mean(seeing: Bundles) -> None:
    """Text that may begin a stop string waits; what it waited for counts."""
    model = load(seeing("spin"), engine="onnx")
    first, second, *_ = model.stream(PROMPT, images=[picture()], **LONG)
    stop = first + second + "no such text"
    pieces = list(model.stream(PROMPT, images=[picture()], with_scores=True, stop=stop, **LONG))
    assert pieces[0].text.startswith(first + second)
    waited, alone = piece_masses(model, stop), piece_masses(model)
    assert len(waited[0]) > len(alone[0])
    wanted = [np.mean(masses) for masses in waited]
    assert [piece.image_mass for piece in pieces] == pytest.approx(wanted)


def test_bundles_that_do_not_say(seeing: Bundles, source: Path, engine: str) -> None:
    facts = [read_manifest(seeing(kind)).vision for kind in ("watched", "unwatched")]
    assert [fact is not None and fact.image_mass for fact in facts] == [True, False]
    model = load(seeing("unwatched"), engine=engine)
    with pytest.raises(UsageError, match=r"does not say how far it looks at pictures; convert"):
        model.stream(PROMPT, images=[picture()], with_scores=True)
    (ids,), seen = model._prompts([PROMPT], [[picture()]])
    assert seen is not None
    session = model.session()
    session.append(ids, pictures=model.look(seen))
    assert session.image_mass is None
    with pytest.raises(UsageError, match="beam search cannot stream"):
        load(seeing("spin"), engine=engine).stream(PROMPT, with_scores=True, num_beams=2)


def test_conversions_without_a_mass(
    source: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"spin_scores given for .*, which reads no pictures"):
        convert(tiny_checkpoint("llama"), tmp_path / "out", spin_scores=True)
    sums = SpinConfig(suppress=1, score="logit")
    with pytest.raises(UsageError, match="which is no share of attention; score by 'mass'"):
        convert(source, tmp_path / "out", spin=sums, spin_scores=True)


def test_command(
    source: Path, seeing: Bundles, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture().save(tmp_path / "a.png")
    made = ["convert", str(source), "-o", str(tmp_path / "out"), "--spin-scores", "--no-verify"]
    assert main([*made, "--format", "onnx", "--weights", "fp32"]) == 0
    run = ["run", str(tmp_path / "out"), "-p", PROMPT, "--raw", "--max-new-tokens", "6"]
    capfd.readouterr()
    looking = [*run, "--scores", "--image", str(tmp_path / "a.png")]
    assert main([*looking, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    masses = found["image_mass"]
    assert "".join(found["pieces"]) == found["text"]
    assert len(masses) == len(found["pieces"]) > 0
    assert all(0 < mass < 1 for mass in masses)
    assert main(looking) == 0
    said = capfd.readouterr()
    assert said.out == found["text"] + "\n"
    first, last = (f"{mass:.2f}" for mass in (masses[0], masses[-1]))
    assert f"image mass: {first} at the first piece of text, {last} at the last" in said.err
    assert main([*run, "--scores"]) == 0
    assert "image mass: none, without a picture" in capfd.readouterr().err
    assert main([*run, "--json"]) == 0
    assert "image_mass" not in json.loads(capfd.readouterr().out)
    assert main([*looking, "--num-beams", "2"]) == 2
    assert "--scores given with --num-beams 2; allowed: with 1" in capfd.readouterr().err
    assert main(["run", str(seeing("unwatched")), *run[2:], "--scores"]) == 2
    assert "convert a vision-language model with --spin-scores" in capfd.readouterr().err
