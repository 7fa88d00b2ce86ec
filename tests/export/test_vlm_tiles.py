"""SmolVLM and Idefics3 with pictures in tiles: what transformers' processor and model make of them.

Tiles have 32 pixels and 4 image tokens; the longer side of a picture becomes 96 pixels.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from edgekit.bundle import read_manifest
from edgekit.errors import BundleError, SourceError, UsageError
from edgekit.export.pipeline import convert
from edgekit.models.spin import SpinConfig
from edgekit.runtime import Model, load
from edgekit.sources import open_source
from edgekit.sources.picture_model import PictureModel, open_picture_model
from edgekit.spin import apply
from edgekit.testing_vlm import IMAGE, write_tiny_vlm

ENGINES = ("openvino", "onnx")
FAMILIES = ("smolvlm", "idefics3")
SPIN = SpinConfig(suppress=1, alpha=0.0)
NEW_TOKENS = 12
MAX_ABS = 1e-4
TOKENS = 4
WIDE, TALL, SQUARE, SMALL = (90, 40), (20, 100), (96, 96), (7, 7)  # width, height

Made = tuple[PictureModel, Path]


def write_source(directory: Path, family: str, **settings: Any) -> None:
    """A checkpoint of either family, which differ in names alone."""
    write_tiny_vlm(directory, "smolvlm")
    change(directory / "preprocessor_config.json", size={"longest_edge": 96}, **settings)
    if family == "idefics3":
        config = json.loads((directory / "config.json").read_text())
        vision = config["vision_config"] | {"model_type": "idefics3_vision"}
        names = {"architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3"}
        change(directory / "config.json", vision_config=vision, **names)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """`made("smolvlm", spin=SPIN)`: a model and its bundle; read-only."""
    folder = tmp_path_factory.mktemp("tiles")
    found: dict[tuple[Any, ...], Made] = {}

    def make(family: str, *, spin: SpinConfig | None = None, split: bool = True) -> Made:
        key = (family, spin is None, split)
        if key not in found:
            source, out = folder / f"source-{len(found)}", folder / f"bundle-{len(found)}"
            write_source(source, family, do_image_splitting=split)
            report = convert(source, out, weights="fp32", target="generic-x86", spin=spin)
            for result in report.verification.values():
                assert result.pictures is not None
                assert max(result.pictures.max_abs, result.pictures.features) <= MAX_ABS
            found[key] = (open_picture_model(open_source(source)), out)
        return found[key]

    return make


def picture(size: tuple[int, int]) -> Image.Image:
    width, height = size
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def theirs(vlm: PictureModel, text: str, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers' own processor gives its model."""
    directory = vlm.source.directory
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
        image_seq_len=TOKENS,
    )
    return dict(processor(images=pictures, text=text, return_tensors="pt"))


def expected(vlm: PictureModel, inputs: dict[str, torch.Tensor]) -> list[int]:
    """What transformers writes, greedily."""
    written = vlm.model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    return [int(token) for token in written[0, inputs["input_ids"].shape[1] :]]


def greedy(model: Model, text: str, pictures: list[Image.Image]) -> list[int]:
    """The same through the session of a bundle; the end of a text does not count."""
    (ids,), seen = model._prompts([text], [pictures])
    assert seen is not None
    session, written = model.session(), []
    logits = session.append(ids, pictures=model.look(seen))[0]
    for _ in range(NEW_TOKENS):
        logits[list(model.manifest.model.eos_token_ids)] = -np.inf
        written.append(int(logits.argmax()))
        logits = session.append(written[-1:])[0]
    return written


CASES = [
    ("ab <image> cd", [WIDE]),
    ("<image>\nOnce upon a time", [TALL]),
    ("<image><image> and <image>", [SMALL, TALL, WIDE]),
    ("<image>x", [SQUARE]),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", [True, False], ids=["tiles", "whole"])
def test_inputs_are_those_of_transformers(
    made: Callable[..., Made], family: str, split: bool
) -> None:
    vlm, out = made(family, split=split)
    model = load(out, engine="onnx")
    for text, sizes in CASES:
        pictures = [picture(size) for size in sizes]
        wanted = theirs(vlm, text, pictures)
        ours = vlm.inputs(text, pictures)
        (ids,), seen = model._prompts([text], [pictures])
        assert seen is not None
        assert wanted["pixel_attention_mask"].all()
        assert torch.equal(ours["input_ids"], wanted["input_ids"])
        assert np.array_equal(ids, wanted["input_ids"][0])
        assert torch.allclose(ours["pixel_values"], wanted["pixel_values"], rtol=0, atol=1e-6)
        (call,) = seen.calls
        assert np.array_equal(call["pixel_values"], ours["pixel_values"][0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("family", "split"), [("smolvlm", True), ("idefics3", True), ("smolvlm", False)]
)
def test_words_are_those_of_transformers(
    made: Callable[..., Made], family: str, split: bool, engine: str
) -> None:
    vlm, out = made(family, split=split)
    model = load(out, engine=engine)
    for text, sizes in CASES:
        pictures = [picture(size) for size in sizes]
        assert greedy(model, text, pictures) == expected(vlm, theirs(vlm, text, pictures))


@pytest.mark.parametrize("engine", ENGINES)
def test_spin_is_that_of_the_torch_form(made: Callable[..., Made], engine: str) -> None:
    vlm, out = made("smolvlm", spin=SPIN)
    plain, model = load(made("smolvlm")[1], engine=engine), load(out, engine=engine)
    cases = [(text, [picture(size) for size in sizes]) for text, sizes in CASES]
    inputs = [theirs(vlm, *case) for case in cases]
    with apply(vlm.model, SPIN):
        wanted = [expected(vlm, given) for given in inputs]
    assert [greedy(model, *case) for case in cases] == wanted
    assert [greedy(plain, *case) for case in cases] != wanted


def test_spin_sees_image_tokens_alone(made: Callable[..., Made]) -> None:
    """Not the names of tiles, nor the ends of rows."""
    model = load(made("smolvlm", spin=SPIN)[1], engine="openvino")
    pictures = [picture(WIDE), picture(SMALL)]
    (ids,), seen = model._prompts(["<image> and <image>"], [pictures])
    assert seen is not None
    assert seen.grids.tolist() == [[1, 2, 3], [1, 3, 3]]
    found = model.session()._contents(ids[None], model.look(seen))["spin_image_mask"]
    assert np.array_equal(found[0], ids == IMAGE)
    assert found.sum() == (7 + 10) * TOKENS
    runs = np.flatnonzero(np.diff(found[0], prepend=0) == 1)  # where each square begins
    assert len(runs) == 7 + 10


def test_prompts_with_other_layouts_side_by_side(made: Callable[..., Made]) -> None:
    model = load(made("smolvlm", spin=SPIN)[1], engine="openvino")
    prompts, sizes = ["ab", "Once upon", "a <image> b"], [[WIDE, TALL], [], [SQUARE]]
    pictures = [[picture(size) for size in row] for row in sizes]
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
    alone = [
        model.generate(prompt, images=seen, **options)
        for prompt, seen in zip(prompts, pictures, strict=True)
    ]
    assert model.generate(prompts, images=pictures, **options) == alone


def test_the_bundle_says_what_stands_for_a_picture(made: Callable[..., Made]) -> None:
    vlm, out = made("smolvlm")
    facts = read_manifest(out).vision
    assert facts is not None
    assert facts.tokens == TOKENS
    model = load(out, engine="onnx")
    (ids,), _ = model._prompts(["<image>x"], [[picture(TALL)]])
    square, fake = "<image>" * TOKENS, "<fake_token_around_image>"
    tiles = "".join(f"{fake}<row_{row}_col_1>{square}\n" for row in (1, 2, 3))
    text = f"{tiles}\n{fake}<global-img>{square}{fake}x"
    assert np.array_equal(ids, model.tokenizer.encode(text))
    messages = [{"role": "user", "content": "What is it?"}]
    assert model.chat_prompt(messages, images=2).count("<image>") == 2
    assert vlm.answer("What is it?", [picture(TALL)], max_new_tokens=4)


def test_bad_requests(made: Callable[..., Made], tmp_path: Path) -> None:
    model = load(made("smolvlm")[1], engine="onnx")
    with pytest.raises(UsageError, match="2 placeholders '<image>' given for 1 pictures"):
        model.generate("<image> and <image>", images=[picture(WIDE)])
    with pytest.raises(UsageError, match=r"tokens given; this model's softmax layers see at most"):
        model.generate("<image>" * 4, images=[picture(SQUARE)] * 4)
    write_source(tmp_path / "side", "smolvlm", max_image_size={"longest_edge": 40})
    with pytest.raises(SourceError, match="max_image_size 40 given, for tiles; allowed: 32, the"):
        open_source(tmp_path / "side")
    write_source(tmp_path / "none", "idefics3", max_image_size=None)
    with pytest.raises(BundleError, match="its image processor: damaged"):
        open_source(tmp_path / "none")
