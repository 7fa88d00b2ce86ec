"""Where a reference must not compute in 16 bits, and where products are made in them."""

import contextlib
from contextlib import AbstractContextManager

import torch

__all__ = ["full_precision", "in_bf16", "widened"]


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or as it is if it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: torch.Tensor) -> AbstractContextManager[object]:
    """A block in which autocast does not narrow what is computed on `x`'s device."""
    if not torch.amp.is_autocast_available(x.device.type):  # such as the meta device
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def in_bf16(x: torch.Tensor) -> bool:
    """Whether products with `x` are in bf16: it is, or autocast makes them so."""
    device = x.device.type
    if x.dtype == torch.bfloat16 or not torch.amp.is_autocast_available(device):
        return x.dtype == torch.bfloat16
    cast = torch.get_autocast_dtype(device)
    return torch.is_autocast_enabled(device) and cast == torch.bfloat16
