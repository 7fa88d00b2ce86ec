"""What a model says of its adapters, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgekit.errors import AdapterError, EdgekitError, UsageError
from edgekit.runtime import Model
from edgekit.testing import assert_close

Maker = Callable[..., Path]
Loader = Callable[..., Model]
SAME = 1e-6  # relative, of the same numbers in another order


def said(model: Model) -> np.ndarray:
    return model.session().append(np.arange(3, 60))


def test_what_is_loaded_is_told(engine: str, fresh: Loader, adapter: Maker) -> None:
    model = fresh("softmax", engine, adapter_slots="all")
    assert model.adapters == {}
    assert model.load_adapter(adapter("aflora"), name="mine") == "mine"
    info = model.adapters["mine"]
    assert (info.matched, info.modules, info.rank) == (6, 6, 3)
    assert info.bytes == 3 * 3 * 4 * ((64 + 64) + (64 + 32))
    assert info.directory == adapter("aflora")
    model.set_adapters({"mine": 2.0})
    assert model.active_adapters == {"mine": 2.0}
    with pytest.raises(UsageError, match="'mine' is set; set_adapters without it first"):
        model.unload_adapter("mine")
    with pytest.raises(UsageError, match="'mine' is loaded already; give another name"):
        model.load_adapter(adapter("lora"), name="mine")
    model.set_adapters({})
    model.unload_adapter("mine")
    assert model.adapters == {}
    for wrong in (model.unload_adapter, lambda name: model.set_adapters({name: 1.0})):
        with pytest.raises(UsageError, match="adapter 'mine' given; loaded are: none"):
            wrong("mine")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True])
def test_a_weight_is_a_finite_number(weight: Any, fresh: Loader, adapter: Maker) -> None:
    model = fresh("softmax", "onnx", adapter_slots="all")
    model.set_adapters({model.load_adapter(adapter("lora")): 0.5})
    want = said(model)
    with pytest.raises(UsageError, match="given for adapter 'lora'; allowed: a finite number"):
        model.set_adapters({"lora": weight})
    np.testing.assert_array_equal(said(model), want)


def test_modules_without_a_slot_are_warned_of(engine: str, fresh: Loader, adapter: Maker) -> None:
    model = fresh("softmax", engine, adapter_slots="q_proj,v_proj")
    assert len(model.manifest.adapter_slots) == 6
    says = r"6 of 21 modules have an adapter slot in this bundle; model\.layers\.0\.mlp\.down_proj"
    with pytest.warns(UserWarning, match=says):
        model.load_adapter(adapter("lora"))
    model.load_adapter(adapter("aflora"))
    assert model.adapters["lora"].matched == 6
    full = fresh("softmax", engine, adapter_slots="all")
    full.load_adapter(adapter("aflora"))
    for each in (model, full):
        each.set_adapters({"aflora": 1.0})
    assert_close("logits", said(full), said(model), ratio=SAME)


def test_a_bundle_without_slots_says_what_to_do(fresh: Loader, adapter: Maker) -> None:
    for engine in ("openvino", "onnx"):
        model = fresh("softmax", engine)
        with pytest.raises(AdapterError, match=r"no adapter slots; .* --adapter-slots all"):
            model.load_adapter(adapter("lora"))
        model.set_adapters({})


def edited(
    adapter: Path,
    out: Path,
    tensors: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    **config: Any,
) -> Path:
    shutil.copytree(adapter, out)
    path = out / "adapter_model.safetensors"
    stored = load_file(path)
    tensors(stored)
    save_file({name: np.ascontiguousarray(array) for name, array in stored.items()}, path)
    settings = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(settings | config))
    return out


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def renamed(tensors: dict[str, np.ndarray]) -> None:
    for name in list(tensors):
        tensors[name.replace("model.layers", "model.decoder.blocks")] = tensors.pop(name)


def wider(tensors: dict[str, np.ndarray]) -> None:
    tensors[FIRST] = np.pad(tensors[FIRST], ((0, 0), (0, 8)))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none-matched": ({"tensors": renamed}, "0 of 21 modules have an adapter slot"),
    "other-base": ({"tensors": wider}, r"this bundle is \[64, 96\], the adapter's is \[64, 104\]"),
    "rank": ({"r": 5}, "for rank 5; save the adapter again"),
    "missing": ({"tensors": lambda t: t.pop(FIRST)}, "lora_A is missing"),
    "nan": ({"tensors": lambda t: t[FIRST].fill(np.nan)}, "not finite"),
    "kind": ({"peft_type": "BONE"}, "peft_type 'BONE' given; allowed here: LORA, AFLORA"),
}


@pytest.mark.parametrize(("changes", "says"), WRONG.values(), ids=WRONG.keys())
def test_an_adapter_that_does_not_fit_is_refused(
    changes: dict[str, Any], says: str, fresh: Loader, adapter: Maker, tmp_path: Path
) -> None:
    model = fresh("softmax", "onnx", adapter_slots="all")
    bad = edited(adapter("lora"), tmp_path / "bad", **changes)
    with pytest.raises(AdapterError, match=says) as caught:
        model.load_adapter(bad)
    assert "\n" not in str(caught.value)
    assert model.adapters == {}


def test_a_method_that_is_no_difference_of_low_rank_is_refused(
    fresh: Loader, adapter: Maker, tmp_path: Path
) -> None:
    model = fresh("softmax", "onnx", adapter_slots="all")
    with pytest.raises(AdapterError, match="more than a low-rank difference"):
        model.load_adapter(adapter("dora"))
    pickled = tmp_path / "pickled"
    shutil.copytree(adapter("lora"), pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled weights are not read"):
        model.load_adapter(pickled)
    with pytest.raises(EdgekitError, match="cannot be read"):
        model.load_adapter(tmp_path / "nowhere")
