"""`convert` from a checkpoint to a verified bundle: families, mixers, formats, arguments."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from tokenizers import Tokenizer

from edgekit.bundle import ENGINE_FILES, check_files, read_manifest
from edgekit.errors import EdgekitError, SourceError, UsageError
from edgekit.export.pipeline import ConvertReport, convert
from edgekit.export.text_files import write_tokenizer_ir
from edgekit.runtime import load
from edgekit.testing import TINY_FAMILIES

Tiny = Callable[..., Path]
ENGINES = ("openvino", "onnx")
LAYOUTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "lawcat": {"mixer": "lawcat"},
    "hybrid": {"mixer": "lawcat", "softmax_layers": (1,), "state_sharing": "kv_head"},
}
TEXT = "The capital of France is Paris, 12 def convert(x): return 3.14; naïve 日本 \n\n  end."


def quick(source: Path, out: Path, **options: Any) -> ConvertReport:
    """Convert for a target whose settings do not depend on this machine."""
    return convert(source, out, **{"target": "generic-x86", "weights": "fp32", **options})


ROUND_TRIPS = [(family, layout) for family in TINY_FAMILIES for layout in ("softmax", "hybrid")]


@pytest.mark.parametrize(("family", "layout"), [*ROUND_TRIPS, ("qwen3", "lawcat")])
def test_round_trip(tiny_checkpoint: Tiny, tmp_path: Path, family: str, layout: str) -> None:
    out = tmp_path / "out"
    report = quick(tiny_checkpoint(family), out, **LAYOUTS[layout])
    assert list(report.verification) == list(ENGINES)
    for engine, found in report.verification.items():
        assert found.max_abs <= 1e-3
        assert found.greedy_equal == found.decode_steps == 32
        assert found.prompt_tokens == (512 if layout == "lawcat" else 512 - 33)
        assert engine == found.engine
    texts = {e: load(out, engine=e).generate("The", max_new_tokens=8) for e in ENGINES}
    assert texts["openvino"] == texts["onnx"] != ""


@pytest.mark.parametrize(
    ("weights", "layout"),
    [("fp16", "softmax"), ("int8", "softmax"), ("int4", "softmax"), ("int4", "hybrid")],
)
def test_narrow_weights(tiny_checkpoint: Tiny, tmp_path: Path, weights: str, layout: str) -> None:
    report = quick(tiny_checkpoint("qwen3"), tmp_path / "out", weights=weights, **LAYOUTS[layout])
    highest = {"fp16": 1e-3, "int8": 0.05, "int4": 0.5}[weights]
    for found in report.verification.values():
        assert 0 <= found.kl < highest
    manifest = read_manifest(tmp_path / "out")
    assert manifest.weights == weights
    assert {"step": "weights", "format": weights} in manifest.pipeline


def test_the_targets_weights_are_the_default(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    quick(tiny_checkpoint("llama"), tmp_path / "out", weights=None, formats=["onnx"], verify=False)
    assert read_manifest(tmp_path / "out").weights == "int4"


def test_portable_operators(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"onnx_ops": "portable", "formats": ["onnx"], **LAYOUTS["hybrid"]}
    report = quick(tiny_checkpoint("qwen2"), out, **options)
    assert report.verification["onnx"].max_abs < 1e-3
    assert {"step": "onnx", "ops": "portable"} in read_manifest(out).pipeline


@pytest.fixture(scope="module")
def hybrid(
    tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ConvertReport]:
    out = tmp_path_factory.mktemp("pipeline") / "hybrid"
    return out, quick(tiny_checkpoint("llama"), out, **LAYOUTS["hybrid"])


def test_report(hybrid: tuple[Path, ConvertReport]) -> None:
    out, report = hybrid
    assert report.out == out
    assert report.seconds > 0
    assert report.peak_rss_bytes >= report.write_peak_rss_bytes > 50e6
    assert [note for note in report.notes if "not distilled" in note]
    for engine in ENGINES:
        sizes = [(out / name).stat().st_size for name in ENGINE_FILES[engine]]
        assert report.model_bytes[engine] == sum(sizes)


def test_manifest(hybrid: tuple[Path, ConvertReport]) -> None:
    out, report = hybrid
    manifest = read_manifest(out)
    check_files(out, manifest)
    on_disk = {path.name for path in out.iterdir()}
    assert on_disk == {*manifest.files, "edgekit.json"}
    assert {name for files in ENGINE_FILES.values() for name in files} <= on_disk
    assert manifest.mixers == ("lawcat", "softmax", "lawcat")
    assert [(s.layer, s.kind, s.openvino, s.onnx, s.shape) for s in manifest.states] == [
        state("conv", 0, "cache_params.past", "conv_state", (-1, (4 + 2) * 16, 3)),
        state("ssm", 0, "cache_params.past", "recurrent_state", (-1, 2, 16, 24)),
        state("key", 1, "past_key_values", "key", (-1, 2, -1, 16)),
        state("value", 1, "past_key_values", "value", (-1, 2, -1, 16)),
        state("conv", 2, "cache_params.past", "conv_state", (-1, (4 + 2) * 16, 3)),
        state("ssm", 2, "cache_params.past", "recurrent_state", (-1, 2, 16, 24)),
    ]
    assert (manifest.engines, manifest.target) == (ENGINES, "generic-x86")
    assert manifest.source["kind"] == "hf-directory"
    assert len(manifest.source["sha256"]) == 64
    assert {"edgekit", "torch", "openvino", "onnx", "onnxruntime"} <= set(manifest.versions)
    assert (manifest.model.context_length, manifest.model.vocab_size) == (512, 320)
    assert manifest.model.inputs == ("input_ids", "attention_mask", "position_ids")
    for engine in ENGINES:
        assert manifest.verification[engine]["max_abs"] == report.verification[engine].max_abs
    steps = [step["step"] for step in manifest.pipeline]
    assert steps == ["load", "mixers", "weights", "openvino", "onnx"]


def state(
    kind: str, layer: int, ov_prefix: str, onnx_name: str, shape: tuple[int, ...]
) -> tuple[Any, ...]:
    """One row of the state table, in the names that both engines and their peers use."""
    if ov_prefix == "cache_params.past":
        variable = f"{ov_prefix}.{kind}.{layer}"
    else:
        variable = f"{ov_prefix}.{layer}.{kind}"
    onnx = (f"past_key_values.{layer}.{onnx_name}", f"present.{layer}.{onnx_name}")
    return layer, kind, variable, onnx, shape


def test_config_keeps_the_base_model_type(hybrid: tuple[Path, ConvertReport]) -> None:
    config = json.loads((hybrid[0] / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["edgekit"]["decoder"]["mixers"] == ["lawcat", "softmax", "lawcat"]


def test_all_lawcat_has_no_limit(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    quick(tiny_checkpoint("mistral"), tmp_path / "out", mixer="lawcat", verify=False)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.constant_memory
    assert manifest.model.context_length is None
    assert manifest.verification == {}


def test_a_sliding_window_is_told(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("mistral", sliding_window=128)
    report = quick(source, tmp_path / "out", formats=["onnx"])
    assert "sliding window" in report.notes[0]
    assert report.verification["onnx"].prompt_tokens == 128 - 33
    assert read_manifest(tmp_path / "out").model.context_length == 128


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_the_same_input_gives_the_same_files(
    tiny_checkpoint: Tiny, tmp_path: Path, weights: str
) -> None:
    manifests = []
    for name in ("a", "b"):
        out = tmp_path / name
        quick(tiny_checkpoint("qwen3"), out, weights=weights, verify=False, **LAYOUTS["hybrid"])
        manifests.append(read_manifest(out))
    assert manifests[0].files == manifests[1].files
    assert manifests[0].fingerprint == manifests[1].fingerprint


# ---- calibration


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text("The capital of France is Paris, and the river is the Seine. " * 20)
    return path


def test_calibration_changes_the_weights(tiny_checkpoint: Tiny, tmp_path: Path, text: Path) -> None:
    options = {"weights": "int4", "formats": ["openvino"], "verify": False, **LAYOUTS["hybrid"]}
    plain = quick(tiny_checkpoint("llama"), tmp_path / "plain", **options)
    guided = quick(tiny_checkpoint("llama"), tmp_path / "guided", calibration=text, **options)
    manifests = [read_manifest(report.out) for report in (plain, guided)]
    assert len({m.files["openvino_model.bin"].sha256 for m in manifests}) == 2
    assert [s.get("calibration") for s in manifests[1].pipeline if s["step"] == "openvino"] == [
        "calibration.txt"
    ]
    assert str(tmp_path) not in (guided.out / "edgekit.json").read_text()


@pytest.mark.parametrize("content", [None, ""], ids=["missing", "empty"])
def test_calibration_needs_text(
    tiny_checkpoint: Tiny, tmp_path: Path, text: Path, content: str | None
) -> None:
    text.unlink()
    if content is not None:
        text.write_text(content)
    with pytest.raises(UsageError, match=r"calibration text .* (cannot be read|is empty)"):
        quick(tiny_checkpoint("llama"), tmp_path / "out", weights="int4", calibration=text)
    assert not (tmp_path / "out").exists()


# ---- arguments


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights": "int2"}, "weights 'int2' given; allowed: fp32, fp16, int8, int4"),
    "format": ({"formats": ["gguf"]}, "format 'gguf' given; allowed: openvino, onnx"),
    "no-format": ({"formats": []}, "no format given; allowed: openvino, onnx"),
    "one-text": ({"formats": "onnx"}, "format 'o' given"),
    "mixer": ({"mixer": "mamba"}, "mixer 'mamba' is unknown; known: lawcat, "),
    "sharing": ({"state_sharing": "head"}, "state_sharing 'head' given; allowed: q_head, kv_head"),
    "layer": (
        {"mixer": "lawcat", "softmax_layers": [0, 3]},
        "softmax layer 3 given; allowed: 0 to 2",
    ),
    "negative-layer": (
        {"mixer": "lawcat", "softmax_layers": [-1]},
        "softmax layer -1 given; allowed: 0 to 2",
    ),
    "target": ({"target": "pentium"}, "target 'pentium' is unknown; known: generic-arm, generic"),
    "ops": ({"onnx_ops": "magic"}, "onnx_ops 'magic' given; allowed: contrib, portable"),
    "calibration-int8": (
        {"weights": "int8", "calibration": "text"},
        "a calibration text serves int4 weights of the openvino format only",
    ),
    "calibration-onnx": (
        {"weights": "int4", "formats": ["onnx"], "calibration": "text"},
        "a calibration text serves int4 weights of the openvino format only",
    ),
}


@pytest.mark.parametrize(("options", "says"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_refused(
    tiny_checkpoint: Tiny, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    steps: list[str] = []
    options = {"progress": lambda step, number, count: steps.append(step), **options}
    with pytest.raises(EdgekitError, match=says) as caught:
        quick(tiny_checkpoint("llama"), tmp_path / "deep" / "out", **options)
    assert isinstance(caught.value, UsageError)
    assert steps == []
    assert not (tmp_path / "deep").exists()


def test_a_context_too_short_to_verify(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", max_position_embeddings=32)
    with pytest.raises(SourceError, match=r"too short to verify; use --no-verify"):
        quick(source, tmp_path / "out", formats=["onnx"])
    assert not (tmp_path / "out").exists()


def test_progress_counts_every_step(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    quick(tiny_checkpoint("llama"), tmp_path / "out", progress=lambda *step: steps.append(step))
    names = ["tokenizer", *(f"{verb} {e}" for verb in ("write", "verify") for e in ENGINES)]
    assert steps == [(name, i, 6) for i, name in enumerate([*names, "checksums"])]


# ---- text files


@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "LlamaTokenizer", None])
def test_the_tokenizer_ir_says_what_tokenizer_json_says(
    tiny_checkpoint: Tiny, tmp_path: Path, class_name: str | None
) -> None:
    """Whatever `tokenizer_class` a checkpoint states, tokenizer.json is what counts."""
    source = tiny_checkpoint("llama")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = class_name
    if class_name is None:
        del settings["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    write_tokenizer_ir(tmp_path)
    core = ov.Core()
    encode = core.compile_model(tmp_path / "openvino_tokenizer.xml", "CPU")
    decode = core.compile_model(tmp_path / "openvino_detokenizer.xml", "CPU")
    want = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids
    ids = encode([TEXT])["input_ids"]
    assert ids[0].tolist() == want
    assert decode(ids.astype(np.int64))[0].tolist() == [TEXT]
