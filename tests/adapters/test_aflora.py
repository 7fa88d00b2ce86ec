"""AFLoRA is a PEFT method like any other: made, saved, loaded, switched, merged."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from edgekit.adapters.aflora import AFLoraConfig, AFLoraLayer, FreezeController
from edgekit.adapters.aflora.registration import add_type, register
from edgekit.adapters.projections import projections
from edgekit.errors import UsageError
from edgekit.testing import TOLERANCE, assert_close

Make = Callable[..., nn.Module]
Say = Callable[[nn.Module], torch.Tensor]


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def by_part(model: nn.Module, *parts: str) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if any(f".{x}." in n for x in parts))


def test_known_to_peft() -> None:
    add_type()
    register()
    assert PeftType("AFLORA") is PeftType.AFLORA
    assert PeftType.AFLORA in list(PeftType)
    assert PeftType.AFLORA.value.lower() == "aflora"
    assert pickle.loads(pickle.dumps(PeftType.AFLORA)) is PeftType.AFLORA
    assert copy.deepcopy(PeftType.AFLORA) is PeftType.AFLORA


def test_nothing_changes_at_the_start(tiny_llama: Make, tiny_aflora: Make, logits: Say) -> None:
    before = logits(tiny_llama())
    assert torch.equal(logits(tiny_aflora()), before)


def test_initial_values(tiny_aflora: Make) -> None:
    model = tiny_aflora()
    layer = next(m for m in model.modules() if isinstance(m, AFLoraLayer))
    a, b = layer.aflora_A["default"], layer.aflora_B["default"]
    assert 0.9 < a.abs().max() / (6 / 32) ** 0.5 <= 1.0
    assert 0.9 < b.abs().max() / (6 / 3) ** 0.5 <= 1.0
    assert layer.aflora_d["default"].tolist() == pytest.approx([0.1] * 3)
    assert not layer.aflora_b["default"].any()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_counts_of_deberta() -> None:
    from transformers import DebertaV2Config, DebertaV2Model

    with torch.device("meta"):
        model = DebertaV2Model(
            DebertaV2Config(
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                intermediate_size=3072,
                vocab_size=100,
            )
        )
    model = get_peft_model(model, AFLoraConfig(r=4))
    assert by_part(model, "aflora_b", "aflora_d") == 83_232
    assert by_part(model, "aflora_A", "aflora_B") == 368_640 + 294_912
    assert trainable(model) == 451_872  # an encoder's attention is frozen from the start
    controller = FreezeController(model, total_steps=100)
    assert len(controller.alive) == 12 * 4
    controller.maybe_freeze(99)
    assert trainable(model) == controller.trainable() == 83_232


def test_counts_of_llama_7b() -> None:
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=100,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        )
        model = LlamaForCausalLM(config)
    model = get_peft_model(model, AFLoraConfig(r=32))
    assert by_part(model, "aflora_A", "aflora_B") == 56_098_816
    assert by_part(model, "aflora_b", "aflora_d") == 881_664
    assert trainable(model) == 56_098_816 + 881_664


def test_counts_of_bart_large() -> None:
    with torch.device("meta"):
        config = BartConfig(vocab_size=100, max_position_embeddings=16)
        model = BartModel(config)
    model = get_peft_model(model, AFLoraConfig(r=16))
    assert by_part(model, "aflora_A", "aflora_B") == 8_650_752
    assert by_part(model, "aflora_b", "aflora_d") == 273_408


@pytest.mark.parametrize(
    ("choice", "frozen"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj"}),
        ("square", {"q_proj"}),
        ("none", set()),
        (None, set()),
        (["*.layers.0.*"], {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}),
    ],
)
def test_frozen_at_init(choice: object, frozen: set[str], tiny_aflora: Make) -> None:
    model = tiny_aflora(frozen_at_init=choice)
    found = {
        p.module.rpartition(".")[2]
        for p in projections(model, "default").values()
        if not p.parameter.requires_grad
    }
    assert found == frozen


def test_saved_and_loaded_without_a_difference(
    tiny_llama: Make, tmp_path: Path, tiny_aflora: Make, logits: Say
) -> None:
    model = tiny_aflora(trained=True, aflora_alpha=6.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, AFLoraConfig)
    assert config.inference_mode
    own = tiny_llama()
    own.load_adapter(str(tmp_path))
    assert torch.equal(logits(own), logits(model))


def test_tensor_names_are_those_of_the_format(tmp_path: Path, tiny_aflora: Make) -> None:
    from safetensors.torch import load_file

    tiny_aflora(target_modules=["q_proj"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.aflora_"
    shapes = {n.removeprefix(prefix): list(t.shape) for n, t in tensors.items() if prefix in n}
    assert shapes == {"A": [3, 32], "B": [32, 3], "d": [3], "b": [32]}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "AFLORA"


def test_frozen_stays_frozen(tiny_llama: Make, tmp_path: Path, tiny_aflora: Make) -> None:
    model = tiny_aflora(trained=True)
    controller = FreezeController(model, total_steps=100)
    controller.maybe_freeze(40)
    left = controller.alive
    assert 0 < len(left) < 20

    def alive(found: nn.Module) -> list[str]:
        return [n for n, p in projections(found, "default").items() if p.parameter.requires_grad]

    assert alive(model) == left
    with model.disable_adapter():
        assert not alive(model)
    assert alive(model) == left
    model.set_adapter("default")
    assert alive(model) == left
    model.add_adapter("second", AFLoraConfig(r=2))
    model.set_adapter("second")
    model.set_adapter("default")
    assert alive(model) == left
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert alive(again) == left
    assert FreezeController(again, total_steps=100).alive == left


def test_two_adapters_add_up_and_switch(
    tiny_llama: Make, tiny_aflora: Make, scrambled: Make, logits: Say
) -> None:
    model = tiny_aflora()
    model.add_adapter("second", AFLoraConfig(r=2))
    scrambled(model)
    base, both = logits(tiny_llama()), {}
    for name in ("default", "second"):
        model.set_adapter(name)
        both[name] = logits(model)
        assert not torch.equal(both[name], base)
    assert not torch.equal(both["default"], both["second"])
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.delete_adapter("default")
    assert torch.equal(logits(model), both["second"])


def test_merged_says_the_same(tiny_llama: Make, tiny_aflora: Make, logits: Say) -> None:
    model = tiny_aflora(trained=True, aflora_alpha=1.5)
    names = set(tiny_llama().state_dict())
    before = logits(model)
    model.merge_adapter()
    assert_close("merged", before, logits(model), ratio=TOLERANCE["float32"])
    model.unmerge_adapter()
    assert_close("unmerged", before, logits(model), ratio=TOLERANCE["float32"])
    merged = model.merge_and_unload(safe_merge=True)
    assert_close("unloaded", before, logits(merged), ratio=TOLERANCE["float32"])
    assert set(merged.state_dict()) == names
    assert not any(isinstance(m, AFLoraLayer) for m in merged.modules())


def test_safe_merge_refuses_what_is_not_finite(tiny_aflora: Make) -> None:
    model = tiny_aflora(trained=True)
    next(p for n, p in model.named_parameters() if "aflora_b" in n).data.fill_(float("inf"))
    with pytest.raises(UsageError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_conv1d_merges_too(scrambled: Make, logits: Say) -> None:
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(2)
    model = GPT2LMHeadModel(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = scrambled(get_peft_model(model, AFLoraConfig(target_modules=["c_attn", "c_proj"])))
    before = logits(model)
    merged = logits(model.merge_and_unload())
    assert_close("merged", before, merged, ratio=TOLERANCE["float32"])


def test_rank_and_alpha_patterns(tiny_aflora: Make) -> None:
    model = tiny_aflora(
        rank_pattern={"up_proj": 5}, aflora_alpha=6.0, alpha_pattern={"v_proj": 9.0}
    )
    found = {
        n.rpartition(".")[2]: (m.r["default"], m.scaling["default"])
        for n, m in model.named_modules()
        if isinstance(m, AFLoraLayer)
    }
    assert found["up_proj"] == (5, pytest.approx(6 / 5))
    assert found["v_proj"] == (3, 3.0)
    assert found["q_proj"] == (3, 2.0)


def test_peft_converts_it_to_lora(
    tiny_llama: Make, tmp_path: Path, tiny_aflora: Make, logits: Say
) -> None:
    from peft import save_as_lora

    model = tiny_aflora(trained=True)
    save_as_lora(tmp_path, model, rank=3)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_close("lora", logits(model), logits(loaded), ratio=TOLERANCE["float32"])


def test_gradients_checkpointing_and_autocast_train(ids: torch.Tensor, tiny_aflora: Make) -> None:
    model = tiny_aflora().train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "aflora_b" in n]
    assert all(g is not None and g.dtype == torch.float32 and g.any() for g in grads)


def test_training_without_a_controller_is_told(
    tmp_path: Path, tiny_aflora: Make, scrambled: Make
) -> None:
    model = scrambled(tiny_aflora())
    with pytest.warns(UserWarning, match="without a FreezeController"):
        model.save_pretrained(tmp_path)
    FreezeController(model, total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def test_update_and_allocate_is_peft_s_convention(ids: torch.Tensor, tiny_aflora: Make) -> None:
    model = tiny_aflora(total_step=20, delta_t=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    events = 0
    for step in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        events += len(model.base_model.update_and_allocate(step, optimizer))
        optimizer.step()
        optimizer.zero_grad()
    assert events == 20
    assert len(model.peft_config["default"].freeze_log) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r 0 given"),
        ({"bias": "all"}, "trains no biases"),
        ({"pm_init": "xavier"}, "allowed: 'kaiming' or a bound"),
        ({"aflora_dropout": 1.0}, "aflora_dropout 1.0 given"),
        ({"rule": "best"}, "rule 'best' given"),
        ({"layers_pattern": "layers"}, "without layers_to_transform"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AFLoraConfig(**options)


def test_other_modules_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 2))
    with pytest.raises(TypeError, match="Conv1d given as a target"):
        get_peft_model(model, AFLoraConfig(target_modules=["0"]))


def test_loads_from_a_directory_that_transformers_wrote(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert trainable(get_peft_model(model, AFLoraConfig())) > 0
