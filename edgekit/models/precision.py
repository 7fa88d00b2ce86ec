"""The precision of matrix products: which one fits the hardware, and weights kept in it."""

from typing import Literal

import torch
from torch import nn

from edgekit.models.decoder import Decoder

__all__ = ["Precision", "choose_precision", "narrow_frozen"]

Precision = Literal["fp32", "bf16"]


def choose_precision(asked: Precision | Literal["auto"], *, cpu: bool = False) -> Precision:
    """The precision of matrix products: `auto` takes bf16 where the hardware multiplies it."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available() and not cpu:
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def narrow_frozen(decoder: Decoder) -> None:
    """Keep the matrices of a frozen decoder in bf16, in place.

    Under autocast every product would narrow its matrix again, which for short rows costs as much
    as the product. The embedding and the norms, which are not products, stay fp32.
    """
    for module in decoder.layers:
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                linear.weight = nn.Parameter(linear.weight.bfloat16(), requires_grad=False)
    decoder.lm_head.weight = nn.Parameter(decoder.lm_head.weight.bfloat16(), requires_grad=False)
