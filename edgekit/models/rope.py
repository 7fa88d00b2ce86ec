"""Rotary position embedding in the half-split layout of Llama checkpoints (arXiv 2104.09864).

For head width d and position p, the pair (x_i, x_{i + d/2}) is rotated by the angle p * w_i. With
M-RoPE (arXiv 2409.12191) a position has a time, a height and a width, equal where there is text;
the first frequencies turn by the time, the next by the height, the last by the width.
"""

import math

import torch

from edgekit.models.config import RopeConfig

__all__ = ["apply_rope", "frequency_axes", "inverse_frequencies", "rope_tables"]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """The angular frequencies w_i, scaled as the checkpoint asks.

    Returns:
        fp32 `[head_dim / 2]`, radians per position.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    w = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return w / rope.factor
    if rope.kind == "llama3":
        return _llama3(w, rope)
    return w


def _llama3(w: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    wavelength = 2 * math.pi / w
    longest = rope.original_context / rope.low_freq_factor
    shortest = rope.original_context / rope.high_freq_factor
    ramp = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - ramp) * w / rope.factor + ramp * w
    scaled = torch.where(wavelength > longest, w / rope.factor, blended)
    return torch.where(wavelength < shortest, w, scaled)


def frequency_axes(sections: tuple[int, int, int]) -> list[int]:
    """Of each frequency, which axis of a position it turns by: 0 time, 1 height, 2 width."""
    return [axis for axis, size in enumerate(sections) for _ in range(size)]


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for integer positions.

    Args:
        rope: the embedding.
        head_dim: d.
        positions: `[...]` of at most two axes; with `mrope_section` also `[3, B, T]`.

    Returns:
        Two fp32 tensors `[..., d / 2]`, or `[B, T, d / 2]`.
    """
    steps = positions[..., None]
    if rope.mrope_section is not None and positions.dim() == 3:
        steps = positions[frequency_axes(rope.mrope_section)].movedim(0, -1)
    angles = steps.float() * inverse_frequencies(rope, head_dim).to(positions.device)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x [B, T, H, d]` by tables `[B, T, d / 2]`."""
    low, high = x.chunk(2, dim=-1)
    c, s = cos[..., None, :], sin[..., None, :]
    return torch.cat((low * c - high * s, high * c + low * s), dim=-1)
