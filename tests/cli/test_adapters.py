"""`--adapter-slots` of convert, and `--adapter` of run, chat and profile."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

Edgekit = Callable[..., Any]


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of q and v that says something."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=random))
    out = tmp_path_factory.mktemp("adapter") / "lora"
    model.save_pretrained(out)
    return out


@pytest.fixture
def slotted(edgekit: Edgekit, checkpoint: Path, tmp_path: Path) -> Path:
    out = tmp_path / "slots"
    options = ("--weights", "fp32", "--no-verify", "--adapter-slots", "v_proj,*.q_proj")
    done = edgekit("convert", checkpoint, "-o", out, *options)
    assert done.code == 0, done.err
    return out


def test_adapters_from_convert_to_run_chat_and_profile(
    edgekit: Edgekit,
    slotted: Path,
    bundle: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "adapter slots  6 modules" in edgekit("inspect", slotted).out
    run = ("run", slotted, "-p", "The river", "--max-new-tokens", "12", "--engine", "onnx")
    texts = {}
    for weight in ("", ":0", ":-2.5"):
        done = edgekit(*run, "--adapter", f"{adapter}{weight}")
        assert done.code == 0, done.err
        texts[weight] = done.out
    plain = edgekit("run", bundle, *run[2:]).out
    assert texts[":0"] == plain
    assert len(set(texts.values())) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("The river\n"))
    done = edgekit("chat", slotted, *run[4:], "--adapter", adapter)
    assert done.out.strip() == texts[""].strip()
    sizes = ("--prompt", "4", "--depth", "0", "--gen", "2", "--repeat", "1", "--format", "json")
    done = edgekit("profile", slotted, *sizes, "--adapter", f"{adapter}:0.5")
    assert done.code == 0, done.err
    (report,) = json.loads(done.out)
    assert report["adapters"] == {"lora": 0.5}
    assert report["memory"]["total"] > 0


def test_a_directory_stands_for_the_modules_that_it_adapts(
    edgekit: Edgekit, checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    options = ("--weights", "fp32", "--no-verify", "--format", "onnx", "--json")
    out = tmp_path / "out"
    done = edgekit("convert", checkpoint, "-o", out, *options, "--adapter-slots", adapter)
    assert done.code == 0, done.err
    names = [
        name.rpartition(".")[2] for name in edgekit("inspect", out, "--json").json["adapter_slots"]
    ]
    assert names == ["q_proj", "v_proj"] * 3


def test_modules_without_a_slot_are_told_in_one_line(
    edgekit: Edgekit, checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--weights", "fp32", "--no-verify", "--format", "onnx", "--adapter-slots", "v_proj")
    assert edgekit("convert", checkpoint, "-o", out, *options).code == 0
    done = edgekit("run", out, "-p", "Hi", "--max-new-tokens", "2", "--adapter", adapter)
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert line.startswith(f"edgekit: {adapter}: 3 of 6 modules have an adapter slot")


@pytest.mark.parametrize("given", ["{}:nan", "{}:much", ":1"])
def test_run_refuses_a_weight_that_is_no_number(
    given: str, edgekit: Edgekit, bundle: Path, adapter: Path
) -> None:
    done = edgekit("run", bundle, "-p", "Hi", "--adapter", given.format(adapter))
    assert done.code == 2
    assert "allowed: PATH or PATH:WEIGHT, such as my-adapter:0.5" in done.err


def test_run_on_a_bundle_without_slots_says_what_to_do(
    edgekit: Edgekit, bundle: Path, adapter: Path
) -> None:
    done = edgekit("run", bundle, "-p", "Hi", "--adapter", adapter)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "no adapter slots; convert the model again with --adapter-slots all" in line


def test_run_refuses_an_adapter_twice(edgekit: Edgekit, slotted: Path, adapter: Path) -> None:
    done = edgekit("run", slotted, "-p", "Hi", "--adapter", adapter, "--adapter", adapter)
    assert done.code == 2
    assert "adapter 'lora' is loaded already" in done.err


def test_convert_refuses_a_slot_that_is_no_layer(
    edgekit: Edgekit, checkpoint: Path, tmp_path: Path
) -> None:
    done = edgekit("convert", checkpoint, "-o", tmp_path / "out", "--adapter-slots", "lm_head")
    assert done.code == 2
    assert "adapter slots 'lm_head' given; allowed: all, none, " in done.err.splitlines()[-1]
