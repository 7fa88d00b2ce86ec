"""The adapted linear map: Y = X W^T + s b * ((d * (X A^T)) B^T)."""

import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from edgekit.adapters.aflora.config import AFLoraConfig
from edgekit.errors import UsageError
from edgekit.kernels.aflora import lean, reference

__all__ = ["AFLoraLayer", "Linear"]


class AFLoraLayer(BaseTunerLayer):
    """The tensors of every adapter of one linear map.

    `aflora_A` `[r, in]` and `aflora_B` `[out, r]` are the projections, `aflora_d` `[r]` and
    `aflora_b` `[out]` the vectors, each by the adapter's name.
    """

    adapter_layer_names = ("aflora_A", "aflora_B", "aflora_d", "aflora_b")
    other_param_names = ("aflora_dropout", "r", "scaling")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        """Wrap `base_layer`; `update_layer` adds adapters.

        Raises:
            TypeError: if `base_layer` is no linear map.
        """
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.aflora_dropout = nn.ModuleDict({})
        self.aflora_A = nn.ParameterDict({})
        self.aflora_B = nn.ParameterDict({})
        self.aflora_d = nn.ParameterDict({})
        self.aflora_b = nn.ParameterDict({})
        self.frozen_peft_weight_names = {}
        self.freeze_controlled = False
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        inside, outside = _get_in_out_features(self.get_base_layer())
        if inside is None or outside is None:
            raise TypeError(f"unsupported layer type {type(self.get_base_layer()).__name__}")
        self.in_features: int = inside
        self.out_features: int = outside

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        alpha: float | None,
        config: AFLoraConfig,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, its values fresh.

        Args:
            adapter_name: its name.
            r: rank.
            alpha: scale times rank; None: a scale of 1.
            config: everything else.
            inference_mode: do not train it.
        """
        dropout = config.aflora_dropout
        self.r[adapter_name] = r
        self.scaling[adapter_name] = 1.0 if alpha is None else alpha / r
        self.aflora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.aflora_A[adapter_name] = nn.Parameter(torch.empty(r, self.in_features))
        self.aflora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r))
        self.aflora_d[adapter_name] = nn.Parameter(torch.empty(r))
        self.aflora_b[adapter_name] = nn.Parameter(torch.empty(self.out_features))
        self._reset(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A plain low-rank pair with everything folded in, in fp32.

        Returns:
            diag(d) A, `[r, in]`, and s diag(b) B, `[out, r]`.
        """
        a, b = self.aflora_A[adapter].float(), self.aflora_B[adapter].float()
        d_vector, b_vector = self.aflora_d[adapter].float(), self.aflora_b[adapter].float()
        scale = self.scaling[adapter]
        return d_vector[:, None] * a, (scale * b_vector)[:, None] * b

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the difference to W is of rank r."""
        return True

    @torch.no_grad()
    def _reset(self, adapter: str, config: AFLoraConfig) -> None:
        for projection in (self.aflora_A[adapter], self.aflora_B[adapter]):
            if config.pm_init == "kaiming":
                nn.init.kaiming_uniform_(projection, a=0.0)
            else:
                bound = float(config.pm_init)
                nn.init.uniform_(projection, -bound, bound)
        if config.init_weights:
            self.aflora_d[adapter].fill_(config.d_initial)
            self.aflora_b[adapter].zero_()
        else:
            nn.init.normal_(self.aflora_d[adapter], std=config.d_initial)
            nn.init.normal_(self.aflora_b[adapter], std=config.d_initial)


class Linear(nn.Module, AFLoraLayer):
    """An `nn.Linear`, a transformers `Conv1D` or a quantised linear map with AFLoRA beside it."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: AFLoraConfig,
        r: int,
        alpha: float | None,
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        """Wrap `base_layer` with a first adapter.

        Args:
            base_layer: the map.
            adapter_name: of the adapter.
            config: of the adapter.
            r: its rank here.
            alpha: its scale times its rank; None: a scale of 1.
            fan_in_fan_out: the weight is [in, out].
            **kwargs: what PEFT hands on about quantisation.
        """
        super().__init__()
        AFLoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, config)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """S diag(b) B diag(d) A in fp32, `[out, in]`, or `[in, out]` for a Conv1D."""
        a, b = self.factors(adapter)
        return (b @ a).mT if self.fan_in_fan_out else b @ a

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight: in fp32, cast once.

        Args:
            safe_merge: check the sum before it takes the weight's place.
            adapter_names: None: the active ones.

        Raises:
            UsageError: if `safe_merge` finds values that are not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.aflora_A:
                self._add(adapter, 1.0, safe=safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the merged adapters off again; exact up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1.0, safe=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The map's output with the active adapters; `[..., in]` to `[..., out]`."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = cast(torch.Tensor, self.base_layer(x, *args, **kwargs))
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in self.active_adapters:
            if adapter in self.aflora_A:
                result = result + self._side(adapter, x)
        return result.to(dtype)

    def __repr__(self) -> str:
        """PEFT's way to tell the methods' layers apart."""
        return "aflora." + super().__repr__()

    def extra_repr(self) -> str:
        """What PEFT says of a quantised base."""
        return quantization_extra_repr(self)

    def _side(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        a = self.aflora_A[adapter]
        x = self.aflora_dropout[adapter](self._cast_input_dtype(x, a.dtype))
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        form = reference.side_path if plain else lean.side_path
        b, d_vector = self.aflora_B[adapter], self.aflora_d[adapter]
        return form(x, a, b, d_vector, self.aflora_b[adapter], self.scaling[adapter])

    @torch.no_grad()
    def _add(self, adapter: str, sign: float, *, safe: bool) -> None:
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter).to(weight.device)
        merged = (weight.float() + sign * delta).to(weight.dtype)
        if safe and not merged.isfinite().all():
            raise UsageError(f"adapter {adapter!r}: merged weights are not finite; it is broken")
        self.set_base_weight(merged)
