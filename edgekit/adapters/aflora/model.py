"""PEFT's tuner for AFLoRA: which modules are adapted, and what of them is never trained."""

import re
import warnings
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgekit.adapters.aflora.config import AFLoraConfig
from edgekit.adapters.aflora.layer import AFLoraLayer, Linear
from edgekit.adapters.controller import FreezeController, FreezeEvent
from edgekit.adapters.projections import Projection, freeze
from edgekit.errors import UsageError
from edgekit.runtime.adapter_file import by_pattern

__all__ = ["AFLoraModel", "frozen_at_init"]

LLAMA = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the paper's, for GSM8k
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
ENCODER = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
DEBERTA = ("query_proj", "key_proj", "value_proj", *ENCODER[3:])
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2", "distilbert")
TARGETS: dict[str, Any] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    **dict.fromkeys(DECODERS, LLAMA),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ENCODER),
    "deberta-v2": DEBERTA,
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
ATTENTION = re.compile(r"(^|[._])(self_?|cross_?|enc_?dec_?)?(attn|attention)([._]|$)", re.I)


class AFLoraModel(BaseTuner):
    """AFLoRA in a model; `get_peft_model(model, AFLoraConfig(...))` makes it.

    Projections freeze while it is trained: use `AFLoraCallback` with the Trainer, or call a
    `FreezeController` once a step.
    """

    prefix = "aflora_"
    tuner_layer_cls = AFLoraLayer
    target_module_mapping = TARGETS

    def update_and_allocate(
        self,
        global_step: int,
        optimizer: torch.optim.Optimizer | None = None,
        adapter_name: str = "default",
    ) -> list[FreezeEvent]:
        """Score and freeze at `global_step`, from 0: after the gradients, before they are dropped.

        Raises:
            UsageError: if the configuration has no `total_step`.
        """
        controllers = self.__dict__.setdefault("_controllers", {})
        if adapter_name not in controllers:
            total = cast(AFLoraConfig, self.peft_config[adapter_name]).total_step
            if total is None:
                raise UsageError("AFLoraConfig.total_step is None; give the steps of the training")
            controllers[adapter_name] = FreezeController(
                self.model, total_steps=total, adapter=adapter_name
            )
        return cast(FreezeController, controllers[adapter_name]).step(global_step, optimizer)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del parameter_name
        config = cast(AFLoraConfig, peft_config)
        r = by_pattern(config.rank_pattern, current_key, config.r)
        alpha = by_pattern(config.alpha_pattern, current_key, config.aflora_alpha)
        if isinstance(target, Linear):
            layer = target
            layer.update_layer(adapter_name, r, alpha, config)
        else:
            layer = self._wrapped(target, adapter_name, config, r, alpha)
            if adapter_name not in self.active_adapter:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        square = layer.in_features == layer.out_features
        never = frozen_at_init(config, self.get_model_config(self.model), current_key, square)
        parts = ("aflora_A", "aflora_B") if never else config.frozen_pms.get(current_key, ())
        for part in parts:
            freeze(Projection(module=current_key, layer=layer, part=part, adapter=adapter_name))

    def _wrapped(
        self,
        target: nn.Module,
        adapter_name: str,
        config: AFLoraConfig,
        r: int,
        alpha: float | None,
    ) -> Linear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantised = resolve_quantization_backend(base)
        linear = quantised is not None and quantised.layer_type == "linear"
        if not linear and not isinstance(base, nn.Linear | Conv1D):
            raise TypeError(
                f"{type(base).__name__} given as a target; allowed: nn.Linear, transformers' "
                "Conv1D, or a quantised linear map"
            )
        transposed = isinstance(base, Conv1D)
        if config.fan_in_fan_out != transposed:
            kind = type(base).__name__
            warnings.warn(f"fan_in_fan_out is {transposed} for a {kind}", stacklevel=2)
        kwargs = get_quantization_kwargs(self.model)
        return Linear(target, adapter_name, config, r, alpha, transposed, **kwargs)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, torch.Tensor]:
        _warn_if_nobody_froze(model, cast(AFLoraConfig, config), adapter_name)
        return super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )


def frozen_at_init(
    config: AFLoraConfig, model_config: dict[str, Any], name: str, square: bool
) -> bool:
    """Whether the projections of the module called `name` are never trained.

    Args:
        config: its `frozen_at_init`.
        model_config: of the model, with its `model_type`.
        name: of the module.
        square: it has as many inputs as outputs.
    """
    choice = config.frozen_at_init
    if choice is None:
        choice = "attention" if model_config.get("model_type") in ENCODERS else "none"
    if choice == "attention":
        return ATTENTION.search(name) is not None
    if choice == "square":
        return square
    if choice == "none":
        return False
    patterns = [choice] if isinstance(choice, str) else choice
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _warn_if_nobody_froze(model: nn.Module, config: AFLoraConfig, adapter: str) -> None:
    """Adaptive methods that silently do not adapt are what their users complain of."""
    layers = [m for m in model.modules() if isinstance(m, AFLoraLayer) and adapter in m.aflora_b]
    trained = any(bool(layer.aflora_b[adapter].any()) for layer in layers)
    told = config.inference_mode or config.freeze_log or config.frozen_pms
    if not trained or told or any(layer.freeze_controlled for layer in layers):
        return
    warnings.warn(
        "AFLoRA was trained without a FreezeController: no projection was frozen, it behaved as "
        "LoRA with vectors; give the Trainer an AFLoraCallback",
        stacklevel=3,
    )
