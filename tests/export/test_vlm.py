"""Vision-language models as bundles: pictures and text in, the words of transformers out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle import read_manifest
from edgekit.cli.main import main
from edgekit.errors import SourceError, UsageError
from edgekit.export.pipeline import ConvertReport, convert
from edgekit.models.spin import SpinConfig
from edgekit.runtime import Model, load
from edgekit.runtime.pictures import Pictures
from edgekit.sources import open_source
from edgekit.sources.picture_model import PictureModel, open_picture_model
from edgekit.spin import apply
from edgekit.testing_vlm import IMAGE, write_tiny_vlm

ENGINES = ("openvino", "onnx")
FAMILIES = ("llava", "llava-gqa", "smolvlm", "qwen2-vl", "qwen2.5-vl", "gemma3")
SPIN = SpinConfig(suppress=1, alpha=0.0)
NEW_TOKENS = 12
MAX_ABS = 1e-4
PROMPTS = ("The capital of France", "Once upon a time there was a small model")

Made = tuple[PictureModel, Path, ConvertReport]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """`made("llava", spin=SPIN)`: a model, its bundle and the conversion's report; read-only."""
    folder = tmp_path_factory.mktemp("vlm")
    found: dict[str, Made] = {}

    def make(family: str, **options: Any) -> Made:
        name = f"{family}-{len(options)}-{options}".replace("/", "_")
        if name not in found:
            source = folder / f"source-{len(found)}"
            write_tiny_vlm(source, family)
            out = folder / f"bundle-{len(found)}"
            options = {"weights": "fp32", "target": "generic-x86", **options}
            report = convert(source, out, **options)
            found[name] = (open_picture_model(open_source(source)), out, report)
        return found[name]

    return make


def picture(seed: int, width: int = 50, height: int = 38) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def expected(vlm: PictureModel, prompt: str, pictures: list[Image.Image]) -> list[int]:
    """What transformers writes, greedily, for the same tokens and pixels."""
    inputs = vlm.inputs(prompt, pictures)
    written = vlm.model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    return [int(token) for token in written[0, inputs["input_ids"].shape[1] :]]


def greedy(model: Model, prompt: str, pictures: list[Image.Image]) -> list[int]:
    """The same through the session of a bundle; the end of a text does not count."""
    (ids,), seen = model._prompts([prompt], [pictures])
    session, written = model.session(), []
    logits = session.append(ids, pictures=None if seen is None else model.look(seen))[0]
    for _ in range(NEW_TOKENS):
        logits[list(model.manifest.model.eos_token_ids)] = -np.inf
        written.append(int(logits.argmax()))
        logits = session.append(written[-1:])[0]
    return written


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spin", [None, SPIN], ids=["plain", "spin"])
def test_conversion_is_exact(
    made: Callable[..., Made], family: str, spin: SpinConfig | None
) -> None:
    _, out, report = made(family, spin=spin)
    assert set(report.verification) == set(ENGINES)
    for result in report.verification.values():
        assert result.pictures is not None
        assert max(result.max_abs, result.pictures.max_abs, result.pictures.features) <= MAX_ABS
    facts = read_manifest(out).vision
    assert facts is not None
    assert facts.image_token_id == IMAGE
    assert (facts.placeholder == facts.image_token) == (family != "gemma3")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_those_of_transformers(
    made: Callable[..., Made], family: str, engine: str
) -> None:
    vlm, out, _ = made(family, spin=None)
    model = load(out, engine=engine)
    for prompt, pictures in ((PROMPTS[0], [picture(0)]), (PROMPTS[1], [picture(1), picture(2)])):
        assert greedy(model, prompt, pictures) == expected(vlm, prompt, pictures)
    assert greedy(model, PROMPTS[0], []) == expected(vlm, PROMPTS[0], [])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2-vl", "gemma3"])
def test_spin_is_that_of_the_torch_form(
    made: Callable[..., Made], family: str, engine: str
) -> None:
    vlm, out, _ = made(family, spin=SPIN)
    plain = load(made(family, spin=None)[1], engine=engine)
    model = load(out, engine=engine)
    cases = [(prompt, [picture(seed)]) for seed, prompt in enumerate(PROMPTS * 2)]
    with apply(vlm.model, SPIN):
        wanted = [expected(vlm, *case) for case in cases]
    assert [greedy(model, *case) for case in cases] == wanted
    assert [greedy(plain, *case) for case in cases] != wanted
    assert greedy(model, PROMPTS[0], []) == greedy(plain, PROMPTS[0], [])


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_side_by_side(made: Callable[..., Made], engine: str) -> None:
    model = load(made("llava-gqa", spin=SPIN)[1], engine=engine)
    options = {"max_new_tokens": 8, "ignore_eos": True}
    pictures = [[picture(3)], [], [picture(4), picture(5)]]
    prompts = [PROMPTS[0], PROMPTS[1], "a"]
    alone = [
        model.generate(prompt, images=seen, **options)  # type: ignore[arg-type]
        for prompt, seen in zip(prompts, pictures, strict=True)
    ]
    assert model.generate(prompts, images=pictures, **options) == alone  # type: ignore[arg-type]
    streamed = model.stream(PROMPTS[0], images=[picture(3)], **options)  # type: ignore[arg-type]
    assert "".join(streamed) == alone[0]


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
@pytest.mark.parametrize("engine", ENGINES)
def test_beams_with_a_picture(made: Callable[..., Made], family: str, engine: str) -> None:
    vlm, out, _ = made(family, spin=None)
    model = load(out, engine=engine)
    found = model.generate(PROMPTS[0], images=[picture(6)], num_beams=3, max_new_tokens=8)
    inputs = vlm.inputs(PROMPTS[0], [picture(6)])
    written = vlm.model.generate(**inputs, num_beams=3, max_new_tokens=8, do_sample=False)
    assert found == model.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :].tolist())


def test_blocks_of_a_prompt_change_nothing(made: Callable[..., Made]) -> None:
    """`text` queries know no calls: a picture may be cut in two."""
    model = load(made("llava", spin=SPIN)[1], engine="openvino")
    (ids,), seen = model._prompts([f"{PROMPTS[0]} <image> {PROMPTS[1]}"], [[picture(7)]])
    assert seen is not None
    pictures = model.look(seen)
    whole = model.session().append(ids, pictures=pictures)
    cut = int(np.flatnonzero(ids == IMAGE)[5])
    session = model.session()
    session.append(ids[:cut], pictures=Pictures(pictures.features[:5]))
    rest = session.append(ids[cut:], pictures=Pictures(pictures.features[5:]))
    assert np.abs(rest - whole).max() <= MAX_ABS


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_saved_state_goes_on(made: Callable[..., Made], family: str, tmp_path: Path) -> None:
    model = load(made(family, spin=None)[1], engine="onnx")
    facts = model.manifest.vision
    assert facts is not None
    text = f"ab {facts.placeholder} {PROMPTS[0]}"
    (ids,), seen = model._prompts([text], [[picture(9, 80, 40)]])
    assert seen is not None
    session = model.session()
    session.append(ids, pictures=model.look(seen))
    session.save(tmp_path / "state.safetensors")
    loaded = model.session().load(tmp_path / "state.safetensors")
    assert np.array_equal(session.append([5, 6, 7]), loaded.append([5, 6, 7]))


def test_turns_with_pictures(made: Callable[..., Made]) -> None:
    """A second picture after text goes on where the first turn ended."""
    model = load(made("qwen2-vl", spin=None)[1], engine="openvino")
    mark = "<|image_pad|>"
    texts, pictures = [f"ab {mark}", f"ef {mark}"], [[picture(1, 60, 30)], [picture(2, 30, 60)]]
    (whole,), both = model._prompts(["".join(texts)], [[*pictures[0], *pictures[1]]])
    assert both is not None
    expected = model.session().append(whole, pictures=model.look(both))
    session = model.session()
    (first,), _ = model._prompts(texts[:1], pictures[:1])
    assert np.array_equal(whole[: len(first)], first)
    session.append(first, pictures=model.look(pictures[0]))
    logits = session.append(whole[len(first) :], pictures=model.look(pictures[1]))
    assert np.abs(logits - expected).max() <= MAX_ABS


@pytest.mark.parametrize(
    "mixers", [{"mixer": "lawcat"}, {"mixer": "lawcat", "softmax_layers": [1]}]
)
def test_recurrent_decoder_sees(made: Callable[..., Made], mixers: dict[str, Any]) -> None:
    _, out, report = made("llava-gqa", spin=SPIN, **mixers)
    for engine, result in report.verification.items():
        assert result.pictures is not None
        assert max(result.max_abs, result.pictures.max_abs) <= MAX_ABS
        model = load(out, engine=engine)
        images = ([picture(0)], [picture(1)])
        first, second = (
            model.generate(PROMPTS[0], images=seen, max_new_tokens=8, ignore_eos=True)
            for seen in images
        )
        assert first
        assert second


@pytest.mark.parametrize(("weights", "features"), [("fp16", 2e-3), ("int8", 5e-2), ("int4", 5e-2)])
def test_narrow_weights(made: Callable[..., Made], weights: str, features: float) -> None:
    _, out, report = made("llava", weights=weights)
    wide = read_manifest(made("llava", spin=None)[1]).files
    narrow = read_manifest(out).files
    for result in report.verification.values():
        assert result.pictures is not None
        assert result.pictures.features <= features
    for name in ("vision.onnx", "openvino_vision_embeddings_model.bin", "embedding.onnx.data"):
        assert narrow[name].size < 0.85 * wide[name].size


def test_pictures_and_placeholders(made: Callable[..., Made]) -> None:
    model = load(made("llava", spin=None)[1], engine="onnx")
    with pytest.raises(UsageError, match="2 placeholders '<image>' given for 1 pictures"):
        model.generate("<image> and <image>", images=[picture(0)])
    with pytest.raises(UsageError, match="1 placeholders '<image>' given for 0 pictures"):
        model.generate("<image>")
    with pytest.raises(UsageError, match="pictures for 1 prompts given, and 2 prompts"):
        model.generate(["a", "b"], images=[[picture(0)]])
    with pytest.raises(UsageError, match="16 embeddings of pictures given for 0 image tokens"):
        model.session().append([5, 6], pictures=model.look([picture(0)]))
    first, after = "<image>\nab", "ab <image> cd"
    turned = [model.generate(text, images=[picture(0)], max_new_tokens=2) for text in (first, "ab")]
    assert turned[0] == turned[1]
    assert model.generate(after, images=[picture(0)], max_new_tokens=2)


def test_template_of_texts_alone(made: Callable[..., Made], tmp_path: Path) -> None:
    """A placeholder comes before the text where the template cannot write one."""
    bundle = tmp_path / "bundle"
    shutil.copytree(made("llava", spin=None)[1], bundle)
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
    (bundle / "chat_template.jinja").write_text(template)
    model = load(bundle, engine="onnx", check=False)
    messages = [{"role": "user", "content": "What is it?"}]
    assert model.chat_prompt(messages, images=2) == "user: <image>\n<image>\nWhat is it?\n"
    assert model.chat_prompt(messages) == "user: What is it?\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_command(
    made: Callable[..., Made], engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, file = made("smolvlm", spin=None)[1], tmp_path / "a.png"
    picture(8).save(file)
    command = ["run", str(out), "-p", PROMPTS[0], "--engine", engine, "--image", str(file)]
    assert main([*command, "--json", "--max-new-tokens", "4"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert "<image>\n" in found["prompt"]
    assert found["stats"]["prompt_tokens"] > 4
    assert main([*command[:-1], str(tmp_path / "none.png")]) == 2
    assert "no such file; give a picture" in capfd.readouterr().err


def test_command_inspects(made: Callable[..., Made], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made("llava", spin=SPIN)[1])]) == 0
    shown = capfd.readouterr().out
    assert "llava, 16 tokens each, for <image>" in shown
    assert "1 heads, alpha 0.0, by mass, all layers" in shown
    assert main(["inspect", str(made("qwen2-vl", spin=None)[1])]) == 0
    assert "qwen2_vl, as their size says, for <|image_pad|>" in capfd.readouterr().out


def test_bad_requests(made: Callable[..., Made], tmp_path: Path, tiny_checkpoint: Any) -> None:
    text_only = tiny_checkpoint("llama")
    with pytest.raises(UsageError, match="which reads no pictures; give a vision-language model"):
        convert(text_only, tmp_path / "out", spin=SPIN)
    vlm = tmp_path / "vlm"
    write_tiny_vlm(vlm, "llava")
    with pytest.raises(UsageError, match="layers 0 to 9 given; allowed: up to 2"):
        convert(vlm, tmp_path / "out", spin=SpinConfig(suppress=1, layers=(0, 9)))
    with pytest.raises(UsageError, match="suppress 4 given for 4 heads"):
        convert(vlm, tmp_path / "out", spin=SpinConfig(suppress=4))
    (vlm / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match=r"has no preprocessor_config.json"):
        open_source(vlm)


def test_text_models_take_no_pictures(whole: Path, edgekit: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture(0).save(file)
    done = edgekit("run", whole, "-p", "a", "--image", file)
    assert done.code == 2
    assert done.err == [
        "edgekit: error: pictures given to a model that reads text alone; leave them out"
    ]
