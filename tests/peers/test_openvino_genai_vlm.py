"""`openvino_genai.VLMPipeline` on our bundles: the same words, SPIN included, on both back ends."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle import read_manifest
from edgekit.export.pipeline import convert
from edgekit.models.spin import SpinConfig
from edgekit.runtime import load
from edgekit.testing_vlm import write_tiny_vlm

pytestmark = pytest.mark.peer

PROMPT = "The capital of France"
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
NEW_TOKENS = 12


@pytest.fixture(
    scope="module",
    params=[
        "llava-gqa",
        "llava-gqa spin",
        "llava-gqa scores",
        "qwen2-vl",
        "qwen2-vl spin",
        "qwen2.5-vl",
        "gemma3",
    ],
)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    family, _, spun = request.param.partition(" ")
    write_tiny_vlm(folder / "source", family)
    spin = SpinConfig(suppress=1, alpha=0.0) if spun else None  # "scores": and the graph says them
    convert(
        folder / "source",
        folder / "bundle",
        weights="fp32",
        formats=("openvino",),
        target="generic-x86",
        spin=spin,
        spin_scores=spun == "scores",
        verify=False,
    )
    return folder / "bundle"


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_words_are_ours(bundle: Path, backend: str) -> None:
    genai, ov = importlib.import_module("openvino_genai"), importlib.import_module("openvino")
    # Of a size that needs no scaling, and for Gemma3, whose pictures GenAI filters all the same, of
    # one colour: its filters are not Pillow's.
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    vision = read_manifest(bundle).vision
    if vision is not None and vision.family == "gemma3":
        pixels = np.full_like(pixels, 90)
        if backend == "PA":
            pytest.skip(
                "paged attention drops the mask by which tokens of a picture see each other"
            )
    model = load(bundle, engine="openvino")
    ours = model.generate(
        PROMPT, images=[Image.fromarray(pixels)], max_new_tokens=NEW_TOKENS, ignore_eos=True
    )
    pipeline = genai.VLMPipeline(str(bundle), "CPU", ATTENTION_BACKEND=backend, **OPTIONS)
    found = pipeline.generate(
        PROMPT,
        images=[ov.Tensor(pixels[None])],
        max_new_tokens=NEW_TOKENS,
        ignore_eos=True,
        do_sample=False,
        apply_chat_template=False,
    )
    assert found.texts[0] == ours
