"""Side paths in the graphs: slots and constants, beside weights that stay as they were."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch
from safetensors.torch import save_file

from edgekit.artefacts.lowrank import LowRank
from edgekit.bundle import read_manifest, write_manifest
from edgekit.errors import AdapterError, EngineError, UsageError
from edgekit.export.onnx_adapter import write_onnx_adapter
from edgekit.export.openvino_file import write_openvino
from edgekit.export.pipeline import convert
from edgekit.export.side_paths import SidePaths, chosen_slots, linear_modules
from edgekit.export.to_onnx import write_onnx
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder
from edgekit.models.describe import describe_decoder
from edgekit.models.weights import MemoryStore, OverlayStore, WeightStore
from edgekit.runtime import load
from edgekit.sources import open_source
from edgekit.testing import scrambled_decoder

Checkpoint = Callable[..., Path]
LAYOUTS = {
    "softmax": (("softmax",) * 3, "q_head"),
    "kv_head": (("lawcat",) * 3, "kv_head"),
    "three-mixers": (("lolcats", "softmax", "lawcat"), "q_head"),
}
IDS = np.arange(3, 60)
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def pairs_of(weights: WeightStore, modules: Sequence[str], rank: int = 3) -> dict[str, LowRank]:
    def pair(module: str) -> LowRank:
        out, width = weights.tensor(f"{module}.weight").shape
        return LowRank(a=torch.randn(rank, width) / 8, b=torch.randn(out, rank) / 4)

    return {module: pair(module) for module in modules}


def adapter_of(pairs: dict[str, LowRank], out: Path) -> Path:
    """The same pairs as PEFT would have saved them."""
    out.mkdir()
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b
    save_file(tensors, out / "adapter_model.safetensors")
    rank = next(iter(pairs.values())).rank
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


class Names:
    """A graph that only notes which layers are linear."""

    def __init__(self) -> None:
        self.linear: list[str] = []

    def linears(self, x: object, names: Sequence[str]) -> list[object]:
        self.linear += names
        return list(names)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        pairs = ("causal_conv", "feature_map")
        return lambda *arguments: (None, None) if name in pairs else None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_modules_are_those_of_the_graph(layout: str, tiny_checkpoint: Checkpoint) -> None:
    config, _, _ = scrambled_decoder(tiny_checkpoint("llama"), *LAYOUTS[layout])
    names = Names()
    describe_decoder(names, config)  # type: ignore[arg-type]
    assert sorted(names.linear) == sorted(linear_modules(config))


# ---- constants and slots in both graphs, all operators


def merged_logits(
    config: DecoderConfig, weights: WeightStore, pairs: dict[str, LowRank]
) -> np.ndarray:
    changed = {f"{m}.weight": p.fold(weights.tensor(f"{m}.weight")) for m, p in pairs.items()}
    decoder = Decoder.from_store(config, OverlayStore(MemoryStore(changed), weights))
    with torch.inference_mode():
        return decoder(torch.from_numpy(IDS)[None], form="parallel")[0].numpy()


def onnx_logits(directory: Path, config: DecoderConfig, **pairs: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(directory / "model.onnx", options)
    feeds: dict[str, np.ndarray] = {
        "input_ids": IDS[None],
        "attention_mask": np.ones((1, len(IDS)), np.int64),
        "position_ids": np.arange(len(IDS))[None],
        "logits_to_keep": np.array(len(IDS)),
    }
    for item in session.get_inputs():
        if item.name.startswith("past_key_values"):
            shape = [1 if n == "batch" else 0 if isinstance(n, str) else n for n in item.shape]
            feeds[item.name] = np.zeros(shape, np.float32)
    inputs = {i.name for i in (*session.get_inputs(), *session.get_overridable_initializers())}
    feeds = {name: array for name, array in (feeds | pairs).items() if name in inputs}
    logits: np.ndarray = session.run(["logits"], feeds)[0]
    return logits


@pytest.mark.parametrize("ops", ["contrib", "portable"])
@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj,gate_proj", "v_proj", "o_proj,k_proj"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_onnx_graph_adds_both_kinds_to_any_of_its_fused_layers(
    layout: str, targets: str, ops: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, _ = scrambled_decoder(tiny_checkpoint("qwen2"), *LAYOUTS[layout])
    modules = chosen_slots(targets, config)
    constant, slots = pairs_of(weights, modules), pairs_of(weights, modules, rank=2)
    write_onnx(config, weights, tmp_path, ops=ops, side=SidePaths(constant=constant, slots=modules))
    got = onnx_logits(tmp_path, config)
    want = merged_logits(config, weights, constant)
    assert np.abs(got - want).max() <= 1e-4
    feeds = {f"{m}.lora_A": p.a.numpy().T for m, p in slots.items()}
    feeds |= {f"{m}.lora_B": p.b.numpy().T for m, p in slots.items()}
    got = onnx_logits(tmp_path, config, **feeds)
    both = {
        m: LowRank(a=torch.cat((p.a, slots[m].a)), b=torch.cat((p.b, slots[m].b), dim=1))
        for m, p in constant.items()
    }
    assert np.abs(got - merged_logits(config, weights, both)).max() <= 1e-4


def test_onnx_layers_stay_fused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    counts = []
    for name, targets in (("plain", "none"), ("slots", "all")):
        (tmp_path / name).mkdir()
        config, weights, _ = scrambled_decoder(tiny_checkpoint("llama"), *LAYOUTS["softmax"])
        side = SidePaths(slots=chosen_slots(targets, config))
        write_onnx(config, weights, tmp_path / name, weights_format="int4", side=side)
        graph = onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph
        counts.append(Counter(node.op_type for node in graph.node))
    for kept in ("MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"):
        assert counts[0][kept] == counts[1][kept] > 0
    assert counts[1]["MatMul"] - counts[0]["MatMul"] == 3 * 7 * 2
    assert counts[1]["Add"] - counts[0]["Add"] == 3 * 4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights_format", ["fp32", "int4"])
def test_openvino_fuses_slots_and_keeps_its_other_fusions(
    layout: str, family: str, weights_format: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, _ = scrambled_decoder(tiny_checkpoint(family), *LAYOUTS[layout])
    kinds, names = [], []
    for name, targets in (("plain", "none"), ("slots", "all")):
        (tmp_path / name).mkdir()
        side = SidePaths(slots=chosen_slots(targets, config))
        write_openvino(config, weights, tmp_path / name, weights_format=weights_format, side=side)
        model = ov.Core().read_model(tmp_path / name / "openvino_model.xml")
        names.append({n.get_friendly_name() for n in model.get_ops() if _is_product(n)})
        compiled = ov.Core().compile_model(model, "CPU", F32)
        kinds.append(Counter(_kind(node) for node in compiled.get_runtime_model().get_ops()))
    assert kinds[1]["LoRA"] == 21
    for kept in ("ScaledDotProductAttention", "RMS", "FullyConnected", "MemoryOutput"):
        assert kinds[0][kept] == kinds[1][kept]
    assert kinds[1]["MemoryInput"] - kinds[0]["MemoryInput"] == 3 * 21
    assert set(linear_modules(config)) <= names[0]
    assert names[0] <= names[1]


def _is_product(node: ov.Node) -> bool:
    return node.get_type_name() == "MatMul" and node.get_friendly_name().startswith("model.")


def _kind(node: ov.Node) -> str:
    value = node.get_rt_info()["layerType"]
    return value if isinstance(value, str) else str(value.astype(str))


@pytest.mark.parametrize("weights_format", ["int8", "int4"])
def test_openvino_compression_leaves_side_paths_alone(
    weights_format: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, _ = scrambled_decoder(tiny_checkpoint("llama"), *LAYOUTS["kv_head"])
    modules = linear_modules(config)
    side = SidePaths(constant=pairs_of(weights, modules), slots=modules)
    calibration = np.arange(3, 259) if weights_format == "int4" else None
    write_openvino(
        config,
        weights,
        tmp_path,
        weights_format=weights_format,
        side=side,
        group_size=16,
        calibration=calibration,
    )
    narrow, pairs = 0, 0
    for node in ov.Core().read_model(tmp_path / "openvino_model.xml").get_ops():
        if node.get_type_name() == "Constant":
            kind = node.get_element_type().get_type_name()
            narrow += kind in ("i4", "i8", "u4", "u8") and len(node.shape) >= 2
            if re.search(r"\.lora_[AB]$", node.get_friendly_name()):
                pairs += 1
                assert kind == "f32"
    assert pairs == 2 * len(modules)
    assert narrow >= len(modules)


@pytest.mark.parametrize("beside", [True, False])
def test_calibration_does_not_scale_what_a_side_path_reads(
    beside: bool, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """AWQ scales the input of down_proj, in the rows of up_proj."""
    config, weights, _ = scrambled_decoder(tiny_checkpoint("llama"), *LAYOUTS["softmax"])
    side = SidePaths(slots=chosen_slots("down_proj", config) if beside else ())
    ids = np.random.default_rng(0).integers(3, 320, 512)
    options = {"weights_format": "int4", "group_size": 16, "calibration": ids}
    write_openvino(config, weights, tmp_path, side=side, **options)
    model = ov.Core().read_model(tmp_path / "openvino_model.xml")
    name = "model.layers.1.mlp.up_proj"
    product = next(n for n in model.get_ops() if n.get_friendly_name() == name)
    stored = ov.Model([ov.opset15.result(product.input_value(1))], [])
    rounded = ov.Core().compile_model(stored, "CPU", F32)([])[0]
    exact = weights.tensor(f"{name}.weight").numpy()
    gains = (rounded * exact).sum(axis=1) / (exact * exact).sum(axis=1)
    assert (np.abs(gains - 1).max() < 0.1) == beside


# ---- converting


def test_side_path_mode_is_verified_and_told(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama")
    source = open_source(checkpoint)
    modules = [m for m in linear_modules(source.config) if m.endswith(("q_proj", "down_proj"))]
    adapter = adapter_of(pairs_of(source.weights, modules), tmp_path / "lora")
    report = convert(
        checkpoint,
        tmp_path / "out",
        weights="fp32",
        adapters=[f"{adapter}:0.5"],
        adapter_mode="side-path",
        adapter_slots=[str(adapter)],
    )
    assert all(v.max_abs < 1e-3 for v in report.verification.values())
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest.adapter_slots) == set(modules)
    assert manifest.adapter_slots[modules[-1]] == (64, 96)
    steps = {step["step"]: step for step in manifest.pipeline}
    assert steps["adapters"]["mode"] == "side-path"
    assert steps["adapter slots"] == {"step": "adapter slots", "modules": 6}


def test_a_manifest_without_slots_still_opens(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_checkpoint("llama"), out, weights="fp32", formats=["onnx"], verify=False)
    manifest = read_manifest(out)
    assert manifest.adapter_slots == {}
    write_manifest(out, manifest)
    data = json.loads((out / "edgekit.json").read_text())
    del data["adapter_slots"]
    (out / "edgekit.json").write_text(json.dumps(data))
    assert read_manifest(out) == manifest


@pytest.mark.parametrize(
    ("choices", "count"),
    [
        ("all", 21),
        ("none", 0),
        ((), 0),
        ("q_proj, v_proj", 6),
        ("mlp.*", 9),
        ("model.layers.[01].self_attn.o_proj", 2),
        (["model.layers.2.mlp.up_proj", "up_proj"], 3),
    ],
)
def test_slots_are_chosen_by_name(
    choices: str | Sequence[str], count: int, tiny_checkpoint: Checkpoint
) -> None:
    config = open_source(tiny_checkpoint("llama")).config
    found = chosen_slots(choices, config)
    assert len(found) == count
    assert sorted(found, key=linear_modules(config).index) == list(found)


@pytest.mark.parametrize("choices", ["lm_head", "all,q_proj", "", "q", "none,all"])
def test_a_slot_that_is_no_linear_layer_is_refused(
    choices: str, tiny_checkpoint: Checkpoint
) -> None:
    config = open_source(tiny_checkpoint("llama")).config
    with pytest.raises(UsageError, match=r"given; allowed: all, none, an adapter's directory, or"):
        chosen_slots(choices, config)


def test_an_adapted_head_can_have_no_side_path(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tie_word_embeddings=False)
    weights = open_source(checkpoint).weights
    adapter = adapter_of(pairs_of(weights, ["lm_head"]), tmp_path / "lora")
    options = {"weights": "fp32", "formats": ["onnx"], "verify": False}
    says = r"adapts lm_head, which can have no side path; .* merge it"
    for settings in (
        {"adapters": [adapter], "adapter_mode": "side-path"},
        {"adapter_slots": str(adapter)},
    ):
        with pytest.raises(AdapterError, match=says):
            convert(checkpoint, tmp_path / "out", **options, **settings)
        assert not (tmp_path / "out").exists()


# ---- ONNX Runtime's own adapters


def test_onnx_adapter_file_serves_onnx_runtimes_own_adapter(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama")
    source = open_source(checkpoint)
    pairs = pairs_of(source.weights, linear_modules(source.config))
    adapter = adapter_of(pairs, tmp_path / "lora")
    out = tmp_path / "out"
    convert(checkpoint, out, weights="fp32", formats=["onnx"], adapter_slots="all", verify=False)
    assert write_onnx_adapter(out, adapter, tmp_path / "a.onnx_adapter", weight=0.5) == 21
    lora, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    lora.Load(str(tmp_path / "a.onnx_adapter"))
    options.add_active_adapter(lora)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(out / "model.onnx", settings)
    feeds = {"input_ids": IDS[None], "attention_mask": np.ones((1, len(IDS)), np.int64)}
    feeds["position_ids"] = np.arange(len(IDS))[None]
    for item in session.get_inputs():
        if item.name.startswith("past_key_values"):
            feeds[item.name] = np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
    model = load(out)
    model.set_adapters({model.load_adapter(adapter): 0.5})
    want = model.session().append(IDS)
    got = session.run(["logits"], feeds, options)[0][:, -1]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(session.run(["logits"], feeds)[0][:, -1] - want).max() > 1


def test_onnx_adapter_file_that_cannot_be_made(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama")
    weights = open_source(checkpoint).weights
    adapter = adapter_of(pairs_of(weights, ["model.layers.0.mlp.up_proj"]), tmp_path / "lora")
    bundles = {}
    for engine, slots in (("onnx", "none"), ("openvino", "all"), ("onnx", "up_proj")):
        bundles[engine, slots] = tmp_path / f"{engine}-{slots}"
        options = {"weights": "fp32", "formats": [engine], "verify": False}
        convert(checkpoint, bundles[engine, slots], adapter_slots=slots, **options)
    out = tmp_path / "a.onnx_adapter"
    with pytest.raises(AdapterError, match="no adapter slots"):
        write_onnx_adapter(bundles["onnx", "none"], adapter, out)
    with pytest.raises(EngineError, match="has no ONNX graph"):
        write_onnx_adapter(bundles["openvino", "all"], adapter, out)
    with pytest.raises(UsageError, match="cannot be written"):
        write_onnx_adapter(bundles["onnx", "up_proj"], adapter, tmp_path / "no" / out.name)
    with pytest.raises(UsageError, match=r"ends in \.onnx_adapter"):
        write_onnx_adapter(bundles["onnx", "up_proj"], adapter, tmp_path / "a.bin")
    assert not out.exists()
