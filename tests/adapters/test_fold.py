"""AFLoRA folded to LoRA: the same logits, in stock PEFT."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from edgekit.adapters.aflora import fold_to_lora
from edgekit.errors import AdapterError, BundleError
from edgekit.runtime.lowrank import Pair, balanced
from edgekit.testing import TOLERANCE, assert_close

Make = Callable[..., nn.Module]
Say = Callable[[nn.Module], torch.Tensor]


@pytest.fixture
def saved(tmp_path: Path, tiny_aflora: Make) -> tuple[nn.Module, Path]:
    """A model with two ranks and two scales, and its adapter on disk."""
    model = tiny_aflora(
        trained=True,
        rank_pattern={"up_proj": 5},
        aflora_alpha=6.0,
        alpha_pattern={"v_proj": 2.0},
    )
    model.save_pretrained(tmp_path / "aflora")
    return model, tmp_path / "aflora"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_folded_says_the_same(
    saved: tuple[nn.Module, Path], tiny_llama: Make, tmp_path: Path, dtype: str, logits: Say
) -> None:
    model, directory = saved
    folded = fold_to_lora(directory, tmp_path / "lora", dtype=dtype)
    loaded = PeftModel.from_pretrained(tiny_llama(), folded)
    assert_close("logits", logits(model), logits(loaded), ratio=TOLERANCE[dtype])
    config = json.loads((folded / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 5, 5)
    ranks = {
        t.shape[0]
        for n, t in load_file(folded / "adapter_model.safetensors").items()
        if "lora_A" in n
    }
    assert ranks == {5}


def test_stock_peft_loads_it(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    fold_to_lora(saved[1], tmp_path / "lora")
    program = (
        "import sys; from peft import PeftConfig; "
        f"print(PeftConfig.from_pretrained({str(tmp_path / 'lora')!r}).peft_type.value); "
        "assert not any(name.startswith('edgekit') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "LORA", done.stderr


def test_balance_changes_nothing_but_norms() -> None:
    random = np.random.default_rng(0)
    a = random.standard_normal((4, 7), np.float32) * np.float32(1e-3)
    b = random.standard_normal((5, 4), np.float32) * np.float32(1e2)
    b[:, 2] = 0
    even = balanced(Pair(a, b))
    assert_close("product", b @ a, even.b @ even.a, ratio=TOLERANCE["float32"])
    kept = [0, 1, 3]
    norms = np.linalg.norm(even.a, axis=1), np.linalg.norm(even.b, axis=0)
    assert norms[0][kept] == pytest.approx(norms[1][kept], rel=1e-5)
    assert np.array_equal(even.a[2], a[2])


def damaged(directory: Path, **changes: object) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.aflora_b"
    if changes.get("drop"):
        del tensors[name]
    elif changes.get("shape"):
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name] = tensors[name] * float("nan")
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": True}, r"q_proj: aflora_b is missing"),
        ({"shape": True}, r"q_proj: aflora_A \[3, 32\].* do not fit together"),
        ({}, r"q_proj: aflora_b has values that are not finite"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_damaged_adapters_are_refused(
    saved: tuple[nn.Module, Path], tmp_path: Path, change: dict[str, bool], message: str
) -> None:
    damaged(saved[1], **change)
    with pytest.raises(AdapterError, match=message):
        fold_to_lora(saved[1], tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_what_is_no_aflora_adapter(tmp_path: Path, saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(AdapterError, match="cannot be read as JSON"):
        fold_to_lora(tmp_path, tmp_path / "lora")
    config = saved[1] / "adapter_config.json"
    config.write_text(config.read_text().replace('"AFLORA"', '"LORA"'))
    with pytest.raises(AdapterError, match="peft_type 'LORA' given; allowed: 'AFLORA'"):
        fold_to_lora(saved[1], tmp_path / "lora")


def test_pickles_are_not_read(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    (saved[1] / "adapter_model.safetensors").rename(saved[1] / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled weights are not read"):
        fold_to_lora(saved[1], tmp_path / "lora")


def test_an_existing_directory_stays(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    fold_to_lora(saved[1], tmp_path / "lora")
    with pytest.raises(BundleError, match="exists already"):
        fold_to_lora(saved[1], tmp_path / "lora")
    fold_to_lora(saved[1], tmp_path / "lora", force=True)
