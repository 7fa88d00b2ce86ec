"""Adapters in converted bundles: merged before anything is rounded, and told in the manifest."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekit import runtime
from edgekit.adapters.aflora import AFLoraConfig
from edgekit.cli.main import main
from edgekit.errors import AdapterError, UsageError
from edgekit.export.pipeline import convert
from edgekit.sources.student import read_student
from edgekit.testing import TOLERANCE, assert_close, write_tiny_student

Checkpoint = Callable[..., Path]
IDS = torch.arange(3, 60)[None]
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "aflora": lambda: AFLoraConfig(r=3, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=TARGETS),
}


def make(checkpoint: Path, out: Path, kind: str, size: float = 0.2) -> torch.Tensor:
    """An adapter on disk; returns the logits of PEFT's model with it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, CONFIGS[kind]())
        random = torch.Generator().manual_seed(len(kind))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(size * torch.randn(parameter.shape, generator=random))
        model.save_pretrained(out)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def say(bundle: Path, engine: str) -> np.ndarray:
    model = runtime.load(bundle, engine=engine, logits="all")
    return model.session().append(IDS.numpy())


def adapters_step(bundle: Path) -> dict:
    pipeline = json.loads((bundle / "edgekit.json").read_text())["pipeline"]
    return next(step for step in pipeline if step["step"] == "adapters")


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_bundle_says_what_peft_says(
    kind: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("qwen2")
    expected = make(checkpoint, tmp_path / kind, kind)
    report = convert(checkpoint, tmp_path / "b", weights="fp32", adapters=[tmp_path / kind])
    for engine in ("openvino", "onnx"):
        assert_close(engine, expected, say(tmp_path / "b", engine), ratio=TOLERANCE["float32"])
    assert [f.noise < 1e-4 and f.loud == 0 for f in report.fidelity] == [True, True]
    step = adapters_step(tmp_path / "b")
    (record,) = step["adapters"]
    assert (record["kind"], record["weight"]) == ("AFLORA" if kind == "aflora" else "LORA", 1.0)
    assert record["modules"] == len(step["fidelity"][0]["modules"]) == 3 * len(TARGETS)


def test_adapters_under_a_student(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama")
    make(checkpoint, tmp_path / "lora", "lora")
    student = write_tiny_student(tmp_path / "student", checkpoint, ("lawcat",) * 3)
    report = convert(
        checkpoint,
        tmp_path / "b",
        weights="fp32",
        student=student,
        adapters=[f"{tmp_path / 'lora'}:0.5"],
    )
    assert all(v.greedy_equal == v.decode_steps for v in report.verification.values())
    pipeline = json.loads((tmp_path / "b" / "edgekit.json").read_text())["pipeline"]
    steps = [step["step"] for step in pipeline]
    assert steps[:3] == ["load", "adapters", "student"]
    assert read_student(student).manifest.name == pipeline[2]["name"]
    plain = convert(checkpoint, tmp_path / "p", weights="fp32", student=student, formats=["onnx"])
    assert plain.fidelity == ()
    assert np.abs(say(tmp_path / "b", "onnx") - say(tmp_path / "p", "onnx")).max() > 0.1


def test_adapter_of_a_student_goes_with_that_student(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama")
    make(checkpoint, tmp_path / "lora", "lora")
    student = write_tiny_student(tmp_path / "student", checkpoint, ("lawcat",) * 3)
    record = {"name": "student", "sha256": read_student(student).sha256}
    (tmp_path / "lora" / "tune.json").write_text(json.dumps({"student": record}))
    options = {"adapters": [tmp_path / "lora"], "formats": ["onnx"], "verify": False}
    with pytest.raises(AdapterError, match=r"trained on the student student .* give --student"):
        convert(checkpoint, tmp_path / "b", **options)
    other = write_tiny_student(tmp_path / "other", checkpoint, ("lawcat",) * 3, conv_size=3)
    with pytest.raises(AdapterError, match="give --student with that one"):
        convert(checkpoint, tmp_path / "b", student=other, **options)
    convert(checkpoint, tmp_path / "b", student=student, **options)
    (told,) = adapters_step(tmp_path / "b")["adapters"]
    assert told["trained_on"]["student"] == record


def test_small_adapter_drowns_in_int4_and_says_so(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint("llama")
    make(checkpoint, tmp_path / "aflora", "aflora", size=0.02)
    command = ["convert", str(checkpoint), "-o", str(tmp_path / "b"), "--weights", "int4"]
    command += ["--adapter", str(tmp_path / "aflora"), "--lines", "0.5,1", "--no-verify"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "louder than the adapter in 12 of 12 modules" in told
    assert "--adapter-mode side-path" in told
    assert adapters_step(tmp_path / "b")["lines"] == {"first": 0.5, "last": 1.0}


def test_head_of_its_own_is_told_to_other_runtimes(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "head")
    with pytest.raises(AdapterError, match="--untie"):
        convert(checkpoint, tmp_path / "b", adapters=[tmp_path / "head"])
    convert(checkpoint, tmp_path / "b", weights="fp32", adapters=[tmp_path / "head"], untie=True)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama")
    make(checkpoint, tmp_path / "lora", "lora")
    out = tmp_path / "b"
    with pytest.raises(UsageError, match="weight 0 given"):
        convert(checkpoint, out, adapters=[f"{tmp_path / 'lora'}:0"])
    with pytest.raises(UsageError, match="allowed: each once"):
        convert(checkpoint, out, adapters=[tmp_path / "lora"] * 2)
    with pytest.raises(UsageError, match="given without an adapter"):
        convert(checkpoint, out, lines=(0.5, 1.0))
    with pytest.raises(UsageError, match="adapter_mode 'fuse' given; allowed: merge, side-path"):
        convert(checkpoint, out, adapters=[tmp_path / "lora"], adapter_mode="fuse")
    with pytest.raises(AdapterError, match="which the adapter does not fit"):
        convert(tiny_checkpoint("qwen3"), out, adapters=[tmp_path / "lora"])
    assert not out.exists()
