"""Adapters of every kind that PEFT writes, merged: the same logits as PEFT's own model."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgekit.adapters.aflora import AFLoraConfig
from edgekit.errors import AdapterError, UsageError
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder
from edgekit.models.weights import WeightStore
from edgekit.sources import Source, open_source
from edgekit.sources.adapted import LiNeS, adapted
from edgekit.sources.adapters import AdapterChoice, open_adapter, parse_choice
from edgekit.testing import TOLERANCE, assert_close

Checkpoint = Callable[..., Path]
Make = Callable[..., tuple[Path, torch.Tensor]]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ALL}
KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "patterns": lambda: peft.LoraConfig(
        **LORA, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 9}
    ),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=5, target_r=2, lora_alpha=3, target_modules=ATTENTION, total_step=10
    ),
    "vera": lambda: peft.VeraConfig(r=7, target_modules=["q_proj", "v_proj"]),
    "vera-drawn": lambda: peft.VeraConfig(
        r=7, target_modules=["q_proj", "k_proj"], save_projection=False, projection_prng_key=3
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "aflora": lambda: AFLoraConfig(
        r=3, aflora_alpha=5.0, rank_pattern={"up_proj": 2}, target_modules=ALL
    ),
}
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def trained(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Make:
    """`trained("lora")` is an adapter on disk that says something, and its model's logits."""

    def make(kind: str, family: str = "qwen2", name: str = "", seed: int = 0) -> tuple[Path, Any]:
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice on VeRA and its tied weights
            model = peft.get_peft_model(model, KINDS[kind]())
            _shake(model, seed)
            out = tmp_path / (name or kind)
            model.save_pretrained(out)
        with torch.no_grad():
            return out, model.eval()(input_ids=IDS).logits

    return make


def _shake(model: torch.nn.Module, seed: int) -> None:
    """Give every adapter tensor a value that no start has."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=random))
            elif any(part in name for part in ("lora_", "vera_lambda", "aflora_", "ia3_")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))


def say(config: DecoderConfig, weights: WeightStore) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = Decoder.from_store(config, weights)(IDS)[0]
    return logits


@pytest.fixture
def source(tiny_checkpoint: Checkpoint) -> Source:
    return open_source(tiny_checkpoint("qwen2"))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_says_what_peft_says(kind: str, trained: Make, source: Source) -> None:
    path, expected = trained(kind)
    config, store = adapted(source, [AdapterChoice(path=path)])
    (adapter,) = store.adapters
    assert float((expected - say(source.config, source.weights)).abs().max()) > 0.1
    assert_close("logits", expected, say(config, store), ratio=TOLERANCE["float32"])
    assert adapter.low_rank == (kind not in ("dora", "ia3"))
    assert set(store) == set(source.weights)
    assert torch.equal(say(config, store.plain()), say(source.config, source.weights))


def test_differences_add_up_by_their_weights(trained: Make, source: Source) -> None:
    paths = [trained(kind)[0] for kind in ("lora", "aflora", "dora", "ia3")]
    weights = (0.5, -1.5, 2.0, 0.25)
    choices = [AdapterChoice(path=p, weight=w) for p, w in zip(paths, weights, strict=True)]
    _, together = adapted(source, choices)
    name = "model.layers.1.self_attn.v_proj.weight"
    base = source.weights.tensor(name).double()
    expected = base.clone()
    for path, weight in zip(paths, weights, strict=True):
        _, alone = adapted(source, [AdapterChoice(path=path)])
        expected += weight * (alone.tensor(name).double() - base)
    assert_close("sum", expected, together.tensor(name), ratio=TOLERANCE["float32"])


def test_ia3_scales_biases_too(trained: Make, source: Source) -> None:
    path, _ = trained("ia3")
    _, merged = adapted(source, [AdapterChoice(path=path, weight=0.5)])
    (adapter,) = merged.adapters
    module = "model.layers.0.self_attn.k_proj"
    scale = adapter.artefacts[module].scale  # type: ignore[union-attr]
    bias = source.weights.tensor(f"{module}.bias")
    assert_close("bias", bias * (0.5 + 0.5 * scale), merged.tensor(f"{module}.bias"), ratio=1e-6)


def test_depth_scales_the_difference(trained: Make, source: Source) -> None:
    path, _ = trained("lora")
    _, plain = adapted(source, [AdapterChoice(path=path)])
    _, scaled = adapted(source, [AdapterChoice(path=path)], lines=LiNeS(first=0.2, last=0.8))
    for layer, factor in ((0, 0.2), (1, 0.5), (2, 0.8)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        base = source.weights.tensor(name)
        expected = factor * (plain.tensor(name) - base)
        assert_close("difference", expected, scaled.tensor(name) - base, ratio=1e-5)


def test_pairs_are_the_difference(trained: Make, source: Source) -> None:
    choices = [AdapterChoice(path=trained(k)[0], weight=w) for k, w in (("lora", 2), ("aflora", 1))]
    _, store = adapted(source, choices, lines=LiNeS(first=0.5))
    for module in store.modules:
        pair = store.pairs(module)
        assert_close(module, store.difference(module), pair.b @ pair.a, ratio=1e-5)
    assert store.pairs("model.layers.0.self_attn.q_proj").rank == 4 + 3
    _, dora = adapted(source, [AdapterChoice(path=trained("dora")[0])])
    with pytest.raises(AdapterError, match="no low-rank difference; merge it"):
        dora.pairs("model.layers.0.self_attn.q_proj")


def test_adapter_of_the_model_without_its_head(trained: Make, source: Source) -> None:
    path, expected = trained("lora")
    rewrite(path, lambda tensors: {n.replace("model.model.", "model."): t for n, t in tensors})
    merged = adapted(source, [AdapterChoice(path=path)])
    assert_close("logits", expected, say(*merged), ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_needs_permission(
    tied: bool, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama", tie_word_embeddings=tied)
    source = open_source(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    untied = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight = untied
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
        _shake(model, 0)
        model.save_pretrained(tmp_path / "head")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    choice = [AdapterChoice(path=tmp_path / "head")]
    if tied:
        with pytest.raises(AdapterError, match=r"shares with its embedding.*--untie"):
            adapted(source, choice)
    config, merged = adapted(source, choice, untie=tied)
    assert not config.tied_head
    assert_close("logits", expected, say(config, merged), ratio=TOLERANCE["float32"])
    embedding = "model.embed_tokens.weight"
    assert torch.equal(merged.tensor(embedding), source.weights.tensor(embedding))
    rewrite(tmp_path / "head", lambda tensors: {n: t + 1.0 * ("base" in n) for n, t in tensors})
    with pytest.raises(AdapterError, match=r"lm_head\.base_layer\.weight is not as"):
        adapted(source, choice, untie=tied)


def rewrite(path: Path, change: Callable[[Any], dict[str, torch.Tensor]]) -> None:
    file = path / "adapter_model.safetensors"
    save_file(change(load_file(file).items()), file)


def drop(part: str) -> Callable[[Any], dict[str, torch.Tensor]]:
    return lambda tensors: {n: t for n, t in tensors if part not in n}


def renamed(old: str, new: str) -> Callable[[Any], dict[str, torch.Tensor]]:
    return lambda tensors: {n.replace(old, new): t for n, t in tensors}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("layers.0.self_attn.q_proj.lora_B"), "q_proj: lora_B is missing"),
        (renamed("layers.0.", "layers.7."), r"adapts model.layers.7.*, which .* has not"),
        (lambda ts: {n: t[:, :-1].clone() for n, t in ts}, "do not fit together|does not fit"),
        (lambda ts: {n: t * float("nan") for n, t in ts}, "values that are not finite"),
        (renamed("q_proj.lora_A", "q_proj.lora_C"), "nothing reads .*lora_C"),
        (lambda ts: {n: t.long() for n, t in ts}, "is I64; allowed"),
    ],
    ids=["missing", "other-model", "shape", "nan", "unknown", "integers"],
)
def test_tensors_that_are_refused(
    trained: Make, source: Source, change: Callable[[Any], dict[str, torch.Tensor]], message: str
) -> None:
    path, _ = trained("lora")
    rewrite(path, change)
    with pytest.raises(AdapterError, match=message):
        open_adapter(AdapterChoice(path=path), source)


def test_adapters_that_are_refused(
    trained: Make, source: Source, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path, _ = trained("lora")
    other = open_source(tiny_checkpoint("qwen3"))
    with pytest.raises(AdapterError, match=r"k_proj of .* is \[48, 64\], which the adapter does"):
        open_adapter(AdapterChoice(path=path), other)
    base = {"name": "elsewhere", "sha256": "0" * 64}
    (path / "tune.json").write_text(json.dumps({"base": base}))
    with pytest.raises(AdapterError, match="trained on elsewhere"):
        open_adapter(AdapterChoice(path=path), source)
    (path / "tune.json").unlink()
    config = path / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"LORA"', '"OFT"'))
    with pytest.raises(AdapterError, match="peft_type 'OFT' given; known: ADALORA, AFLORA, IA3"):
        open_adapter(AdapterChoice(path=path), source)
    config.write_text(text.replace('"r": 4', '"r": 5'))
    with pytest.raises(AdapterError, match="given for rank 5"):
        open_adapter(AdapterChoice(path=path), source)
    config.write_text("{}")
    with pytest.raises(AdapterError, match="names no peft_type"):
        open_adapter(AdapterChoice(path=path), source)
    with pytest.raises(AdapterError, match="cannot be read as JSON"):
        open_adapter(AdapterChoice(path=tmp_path / "nowhere"), source)


def test_files_that_are_refused(trained: Make, source: Source) -> None:
    path, _ = trained("lora")
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="damaged"):
        open_adapter(AdapterChoice(path=path), source)
    file.rename(path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle"):
        open_adapter(AdapterChoice(path=path), source)


def test_duplicates_are_refused(trained: Make, source: Source, tmp_path: Path) -> None:
    path, _ = trained("lora")
    with pytest.raises(UsageError, match="allowed: each once"):
        adapted(source, [AdapterChoice(path=path), AdapterChoice(path=path, weight=2.0)])
    namesake, _ = trained("aflora", name="deeper/lora")
    with pytest.raises(UsageError, match="allowed: each once"):
        adapted(source, [AdapterChoice(path=path), AdapterChoice(path=namesake)])


def test_spelling_of_a_choice(tmp_path: Path) -> None:
    assert parse_choice("some/adapter") == AdapterChoice(path=Path("some/adapter"))
    assert parse_choice("a:-0.5") == AdapterChoice(path=Path("a"), weight=-0.5)
    (tmp_path / "a:1").mkdir()
    assert parse_choice(str(tmp_path / "a:1")).weight == 1.0
    for text, message in (("a:x", "PATH or PATH:WEIGHT"), ("a:0", "weight 0"), ("a:nan", "nan")):
        with pytest.raises(UsageError, match=message):
            parse_choice(text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_adapters_are_read_exactly(
    trained: Make, source: Source, dtype: torch.dtype
) -> None:
    path, _ = trained("lora")
    rewrite(path, lambda tensors: {n: t.to(dtype) for n, t in tensors})
    stored = load_file(path / "adapter_model.safetensors")
    read = open_adapter(AdapterChoice(path=path), source).file.tensors
    for name, tensor in stored.items():
        plain = torch.from_numpy(read[name.removeprefix("base_model.model.")])
        assert torch.equal(tensor.float(), plain)
