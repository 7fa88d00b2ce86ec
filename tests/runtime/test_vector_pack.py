"""Vector packs: d and b alone, over the projections that they were trained with."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from edgekit.adapters.aflora import AFLoraConfig
from edgekit.errors import AdapterError, UsageError
from edgekit.export.pipeline import convert
from edgekit.runtime import load
from edgekit.runtime.adapter_file import read_adapter
from edgekit.runtime.vector_pack import apply_pack, read_pack, write_pack
from edgekit.testing import assert_close

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def users(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters `ann` and `bob` of the same projections, and `cid` of others; `lora` is another."""
    folder, made = tmp_path_factory.mktemp("users"), {}
    for name, seed, alpha in (("ann", 1, None), ("bob", 1, 6.0), ("cid", 2, None)):
        torch.manual_seed(seed)
        config = AFLoraConfig(r=3, aflora_alpha=alpha, target_modules=["q_proj", "up_proj"])
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
        model = peft.get_peft_model(model, config)
        random = torch.Generator().manual_seed(len(made))
        with torch.no_grad():
            for part, parameter in model.named_parameters():
                if "aflora_b" in part or "aflora_d" in part:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=random))
        made[name] = folder / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing was frozen
            model.save_pretrained(made[name])
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    made["lora"] = folder / "lora"
    model.save_pretrained(made["lora"])
    return made


def test_a_pack_holds_the_vectors_and_stands_for_the_adapter(
    users: dict[str, Path], tmp_path: Path
) -> None:
    bob = read_adapter(users["bob"])
    write_pack(bob, tmp_path / "bob.safetensors")
    stored = load_file(tmp_path / "bob.safetensors")
    assert sum(tensor.size for tensor in stored.values()) == 3 * ((64 + 3) + (96 + 3))
    restored = apply_pack(read_pack(tmp_path / "bob.safetensors"), read_adapter(users["ann"]))
    assert restored.config["aflora_alpha"] == 6.0
    assert restored.tensors.keys() == bob.tensors.keys()
    for name, tensor in bob.tensors.items():
        np.testing.assert_array_equal(restored.tensors[name], tensor)


def test_a_model_takes_packs_over_one_adapter(
    users: dict[str, Path], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    convert(
        tiny_checkpoint("llama"),
        tmp_path / "bundle",
        weights="fp32",
        formats=["onnx"],
        adapter_slots="q_proj,up_proj",
        verify=False,
    )
    model = load(tmp_path / "bundle")
    for half in (False, True):
        pack = tmp_path / f"{'half' if half else 'full'}.safetensors"
        write_pack(read_adapter(users["bob"]), pack, half=half)
    model.load_adapter(users["ann"])
    model.load_adapter(users["bob"])
    assert model.load_adapter(tmp_path / "full.safetensors", over="ann") == "full"
    assert model.load_adapter(tmp_path / "half.safetensors", over=users["ann"]) == "half"
    with pytest.raises(AdapterError, match="together with the adapter that it is over"):
        model.load_adapter(pack)
    with pytest.raises(AdapterError, match="cannot be read as JSON"):
        model.load_adapter(pack, name="other", over="nobody")
    logits = {}
    for name in ("ann", "bob", "full", "half"):
        model.set_adapters({name: 1.0})
        logits[name] = model.session().append(np.arange(3, 40))
    np.testing.assert_array_equal(logits["full"], logits["bob"])
    assert_close("half", logits["bob"], logits["half"], ratio=2e-3)
    assert np.abs(logits["ann"] - logits["bob"]).max() > 0.1


def test_a_pack_of_other_projections_is_refused(users: dict[str, Path], tmp_path: Path) -> None:
    pack = tmp_path / "cid.safetensors"
    write_pack(read_adapter(users["cid"]), pack)
    with pytest.raises(AdapterError, match="belongs to other projections"):
        apply_pack(read_pack(pack), read_adapter(users["ann"]))
    for use in (write_pack, lambda file, path: apply_pack(read_pack(path), file)):
        with pytest.raises(AdapterError, match="'LORA' given; vector packs are for AFLORA alone"):
            use(read_adapter(users["lora"]), pack)


def test_a_damaged_pack_is_refused(users: dict[str, Path], tmp_path: Path) -> None:
    ann, pack = read_adapter(users["ann"]), tmp_path / "ann.safetensors"
    write_pack(ann, pack)
    stored, metadata = load_file(pack), {"format": "edgekit-vectors-1"}
    first = next(iter(stored))
    cases = {
        "no vector pack, or damaged": lambda: pack.write_bytes(b"nothing"),
        "not a vector pack of this edgekit": lambda: save_file(stored, pack),
        "is no vector of a pack": lambda: save_file({"a.weight": stored[first]}, pack, metadata),
        "not finite": lambda: save_file({first: stored[first] * np.nan}, pack, metadata),
    }
    for says, damage in cases.items():
        damage()
        with pytest.raises(AdapterError, match=says):
            read_pack(pack)
    with pytest.raises(AdapterError, match="no vector pack"):
        read_pack(tmp_path / "nowhere")
    write_pack(ann, pack)
    kept = read_pack(pack)
    fewer = {name: tensor for name, tensor in kept.tensors.items() if name != first}
    save_file(fewer, pack, metadata | {"projections_sha256": kept.projections_sha256})
    with pytest.raises(AdapterError, match=f"{first} is missing"):
        apply_pack(read_pack(pack), ann)


def test_what_cannot_be_written_is_told(users: dict[str, Path], tmp_path: Path) -> None:
    ann = read_adapter(users["ann"])
    with pytest.raises(UsageError, match="cannot be written"):
        write_pack(ann, tmp_path / "nowhere" / "pack")
    name = next(name for name in ann.tensors if name.endswith("aflora_b"))
    ann.tensors[name][0] = 1e5  # type: ignore[index]
    with pytest.raises(AdapterError, match="is beyond fp16; write the pack in fp32"):
        write_pack(ann, tmp_path / "pack", half=True)
    assert list(tmp_path.iterdir()) == []
