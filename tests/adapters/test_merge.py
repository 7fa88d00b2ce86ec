"""Merged directories that transformers opens, stacked adapters, and what is told of both."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgekit.adapters import merge
from edgekit.adapters.aflora import AFLoraConfig
from edgekit.adapters.info import adapter_info
from edgekit.adapters.merge import merge_adapters
from edgekit.adapters.stack import stack_adapters
from edgekit.cli.main import main
from edgekit.errors import AdapterError, BundleError
from edgekit.sources.adapters import AdapterChoice
from edgekit.testing import TOLERANCE, assert_close

Checkpoint = Callable[..., Path]
IDS = torch.arange(3, 40)[None]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]),
    "aflora": lambda: AFLoraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["v_proj"]),
}


@pytest.fixture
def made(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., Path]:
    """`made("lora")` is an adapter of the tiny Llama that says something."""

    def make(kind: str, size: float = 0.2, family: str = "llama") -> Path:
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, CONFIGS[kind]())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(size * torch.randn(parameter.shape))
            model.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


def said(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def with_adapters(checkpoint: Path, weights: dict[Path, float]) -> torch.Tensor:
    """PEFT's own sum of differences, merged into its own model."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    total = {name: p.clone() for name, p in plain.items()}
    for path, weight in weights.items():
        alone = AutoModelForCausalLM.from_pretrained(checkpoint)
        merged = peft.PeftModel.from_pretrained(alone, path).merge_and_unload()
        for name, parameter in merged.named_parameters():
            total[name] += weight * (parameter.detach() - plain[name])
    model.load_state_dict(total, strict=False)
    return said(model)


@pytest.mark.parametrize("shard_bytes", [2 << 30, 40_000], ids=["one-file", "shards"])
def test_transformers_opens_what_was_merged(
    tiny_checkpoint: Checkpoint,
    made: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shard_bytes: int,
) -> None:
    monkeypatch.setattr(merge, "SHARD_BYTES", shard_bytes)
    checkpoint = tiny_checkpoint("llama")
    weights = {made("lora"): 1.0, made("dora"): -0.5}
    choices = [AdapterChoice(path=path, weight=w) for path, w in weights.items()]
    report = merge_adapters(checkpoint, tmp_path / "merged", choices)
    sizes = [path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors")]
    assert (len(sizes) == 1) == (shard_bytes > sum(sizes))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = with_adapters(checkpoint, weights)
    assert_close("logits", expected, said(opened), ratio=TOLERANCE["float32"])
    assert len(report.modules) == 3 * 3
    assert max(module.lost for module in report.modules) < 1e-5
    assert not report.notes
    assert not [name for name in opened.state_dict() if "lora" in name]


def test_narrow_dtypes_lose_small_differences_and_say_so(
    tiny_checkpoint: Checkpoint,
    made: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = made("lora", size=3e-3)
    out = tmp_path / "merged"
    command = ["adapter", "merge", str(tiny_checkpoint("llama")), str(adapter), "-o", str(out)]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "bfloat16 loses" in told
    assert "--adapter-mode side-path" in told
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert main([*command, "--json", "--force"]) == 0
    assert max(m["lost"] for m in json.loads(capsys.readouterr().out)["modules"]) < 1e-2


def test_stack_is_the_sum(
    tiny_checkpoint: Checkpoint, made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama")
    weights = {made("lora"): 0.5, made("aflora"): 2.0}
    choices = [AdapterChoice(path=path, weight=w) for path, w in weights.items()]
    stacked = stack_adapters(choices, tmp_path / "sum")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    loaded = said(peft.PeftModel.from_pretrained(model, stacked))
    expected = with_adapters(checkpoint, weights)
    assert_close("logits", expected, loaded, ratio=TOLERANCE["float32"])
    assert adapter_info(stacked).ranks == (7,)


def test_fold_and_info_on_the_command_line(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = made("aflora"), tmp_path / "folded"
    assert main(["adapter", "fold", str(adapter), "-o", str(tmp_path / "one")]) == 0
    assert main(["adapter", "fold", f"{adapter}:0.5", "-o", str(out), "--dtype", "float16"]) == 0
    capsys.readouterr()
    whole, half = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "one", out))
    for name in [name for name in whole if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        product = half[other].float() @ half[name].float()
        assert_close(name, whole[other] @ whole[name] / 2, product, ratio=TOLERANCE["float16"])
    assert main(["adapter", "info", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["ranks"], found["low_rank"]) == ("LORA", [3], True)
    assert found["targets"] == ["q_proj", "v_proj"]
    assert main(["adapter", "info", str(made("dora"))]) == 0
    assert "no: it can be merged only" in capsys.readouterr().out


def test_pack_and_onnx_on_the_command_line(
    tiny_checkpoint: Checkpoint,
    made: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter, bundle = made("aflora"), tmp_path / "bundle"
    vectors, file = tmp_path / "v.safetensors", tmp_path / "a.onnx_adapter"
    assert main(["adapter", "pack", str(adapter), "-o", str(vectors), "--half"]) == 0
    assert vectors.stat().st_size < (adapter / "adapter_model.safetensors").stat().st_size / 2
    options = ["--format", "onnx", "--no-verify", "--adapter-slots", "q_proj,v_proj"]
    checkpoint = str(tiny_checkpoint("llama"))
    assert main(["convert", checkpoint, "-o", str(bundle), *options]) == 0
    capsys.readouterr()
    assert main(["adapter", "onnx", str(bundle), f"{adapter}:0.5", "-o", str(file)]) == 0
    assert "modules  6" in capsys.readouterr().out
    assert file.read_bytes()[4:8] == b"TORT"
    assert main(["adapter", "pack", str(made("lora")), "-o", str(tmp_path / "w.safetensors")]) == 1
    assert "AFLORA" in capsys.readouterr().err


def test_without_adapters_the_model_is_written_as_it_is(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama")
    report = merge_adapters(checkpoint, tmp_path / "same", [])
    assert report.modules == ()
    ids = torch.arange(3, 40)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path)(ids).logits
        for path in (checkpoint, tmp_path / "same")
    )
    assert torch.equal(before, after)


def test_what_is_refused(
    tiny_checkpoint: Checkpoint, made: Callable[..., Path], tmp_path: Path
) -> None:
    lora, dora = made("lora"), made("dora")
    with pytest.raises(AdapterError, match="more than a low-rank difference"):
        stack_adapters([AdapterChoice(path=dora)], tmp_path / "out")
    elsewhere = made("aflora", family="qwen3")
    with pytest.raises(AdapterError, match="give adapters of one model"):
        stack_adapters([AdapterChoice(path=lora), AdapterChoice(path=elsewhere)], tmp_path / "out")
    with pytest.raises(AdapterError, match="does not fit"):
        merge_adapters(tiny_checkpoint("llama"), tmp_path / "out", [AdapterChoice(path=elsewhere)])
    with pytest.raises(AdapterError, match="too large for float16"):
        merge_adapters(
            tiny_checkpoint("llama"),
            tmp_path / "out",
            [AdapterChoice(path=lora, weight=1e7)],
            dtype="float16",
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(BundleError, match="exists already"):
        merge_adapters(tiny_checkpoint("llama"), lora, [AdapterChoice(path=lora)])
