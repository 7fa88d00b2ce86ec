"""LAWCAT: normalised gated linear attention behind a short causal convolution (arXiv 2509.18467).

Per layer: teacher projections; repeat of k to the query heads (`q_head`) or not (`kv_head`);
depthwise convolution of K taps on q and on k; one feature matrix per state head, shared by q and k;
a low-rank gate giving each state row its own decay; the recurrence of `kernels/gla/reference.py`;
the teacher's output projection. No rotation (unless `position = "rope"`), no output gate, no output
norm.

State, constant in the sequence length, fp32, S state heads:
    ssm   [B, S, F, d + 1]              values and, in the last column, the normaliser
    conv  [B, (H + S) d, K - 1]         the last inputs of the convolution: q's channels, then k's

`LawcatConfig.conv = False` and `.normaliser = False` are ablations: no convolution (and no `conv`
state), no denominator.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgekit.kernels.conv_feature import conv_feature
from edgekit.kernels.conv_feature.reference import feature_map
from edgekit.kernels.gla import gla
from edgekit.kernels.gla.reference import parallel_gla, recurrent_gla
from edgekit.kernels.precision import full_precision, in_bf16, widened
from edgekit.mixers.base import MixerConfig, MixerContext, State, TokenMixer
from edgekit.mixers.graph import Graph

__all__ = ["Mixer"]

FORMS = {"parallel": parallel_gla, "chunked": gla, "recurrent": recurrent_gla}
IDENTITY_TAP = 0.001  # initial weight of the taps before the current token
INIT_STD = 0.006  # of the gate's matrices


class Mixer(TokenMixer):
    """The default student: constant memory, constant time per token."""

    def __init__(self, config: MixerConfig) -> None:
        """Add the convolutions, the feature matrices and the gate to the teacher's projections."""
        super().__init__(config)
        options, d, states = config.lawcat, config.head_dim, config.state_heads
        if options.conv:
            self.conv_q = _Taps(config.num_heads * d, options.conv_size)
            self.conv_k = _Taps(states * d, options.conv_size)
        self.feature_map = _Taps(states, d, config.feature_dim)
        self.gate_down = nn.Linear(config.hidden_size, options.gate_rank, bias=False)
        self.gate_up = nn.Linear(options.gate_rank, config.num_kv_heads * config.state_rows)

    def mix(
        self, x: torch.Tensor, context: MixerContext, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Read `x [B, T, D]` in the form `context.form`; padding is a no-op."""
        options = self.config.lawcat
        q, k, v, g = self._projected(x, context)
        # Tensor cores take 16 bits; elsewhere a product of 32 bits costs no more.
        narrow = x.is_cuda and context.form == "chunked" and in_bf16(x)
        q, k, after = self._features(q, k, context, state, torch.bfloat16 if narrow else None)
        if context.mask is not None:
            valid = context.mask[..., None, None].to(k.dtype)
            k, g = k * valid, g * valid.to(g.dtype)
        entering = None if state is None else state["ssm"]
        with full_precision(x):
            y, after["ssm"] = FORMS[context.form](
                q,
                k,
                v if narrow else widened(v),
                g,
                entering,
                eps=options.eps,
                normalise=options.normaliser,
            )
        return self.gated(y, context).to(x.dtype), after

    def _projected(
        self, x: torch.Tensor, context: MixerContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[B, T, H, d]`; keys, values and the log decay, repeated to the state heads."""
        repeat = self.config.state_heads // self.config.num_kv_heads
        q, k, v = self.project(x)
        v = self.marked(v, context)
        if self.config.lawcat.position == "rope":
            q, k = self.rotated(q, context), self.rotated(k, context)
        k, v, g = (y.repeat_interleave(repeat, dim=2) for y in (k, v, self.log_decay(x)))
        return q, k, v, g

    def _features(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        context: MixerContext,
        state: State | None,
        dtype: torch.dtype | None,
    ) -> tuple[torch.Tensor, torch.Tensor, State]:
        """phi(q) `[B, T, H, F]` and phi(k) `[B, T, S, F]`, convolved; the convolutions' state."""
        groups = self.config.num_heads // self.config.state_heads
        weight = self.feature_map.weight
        for_q = weight.repeat_interleave(groups, dim=0)
        if not self.config.lawcat.conv:
            q, k = feature_map(q, for_q), feature_map(k, weight)
            return q.to(dtype or q.dtype), k.to(dtype or k.dtype), {}
        tails: tuple[torch.Tensor | None, ...] = (None, None)
        if state is not None:
            channels = [q.shape[2] * q.shape[3], k.shape[2] * k.shape[3]]
            tails = torch.split(state["conv"], channels, dim=1)
        given = ((q, self.conv_q, for_q, tails[0]), (k, self.conv_k, weight, tails[1]))
        (q, k), after = zip(
            *(
                conv_feature(x, taps.weight, matrix, tail, context.mask, dtype=dtype)
                for x, taps, matrix, tail in given
            ),
            strict=True,
        )
        return q, k, {"conv": torch.cat(after, dim=1)}

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """Log decay max(logsigmoid(gate(x)) / divisor, floor), `[B, T, Hkv, F]`."""
        options = self.config.lawcat
        a = widened(self.gate_up(self.gate_down(x)))
        g = functional.logsigmoid(a) / options.gate_divisor
        floored: torch.Tensor = g.clamp_min(options.gate_floor)
        return floored.reshape(*floored.shape[:2], -1, self.config.state_rows)

    @staticmethod
    def fresh_tensors(config: MixerConfig, layer: int) -> Mapping[str, torch.Tensor]:
        """Identity convolution, rectangular identity map, small gate seeded by the layer."""
        options, d, states = config.lawcat, config.head_dim, config.state_heads
        random = torch.Generator().manual_seed(layer)
        width = config.num_kv_heads * config.state_rows
        down = torch.randn(options.gate_rank, config.hidden_size, generator=random) * INIT_STD
        up = torch.randn(width, options.gate_rank, generator=random) * INIT_STD
        convolutions = {
            "conv_q.weight": _identity_taps(config.num_heads * d, options.conv_size),
            "conv_k.weight": _identity_taps(states * d, options.conv_size),
        }
        return (convolutions if options.conv else {}) | {
            "feature_map.weight": torch.eye(d, config.feature_dim).repeat(states, 1, 1),
            "gate_down.weight": down,
            "gate_up.weight": up,
            "gate_up.bias": _gate_bias(config).repeat(config.num_kv_heads),
        }

    @staticmethod
    def describe(graph: Graph[Any], x: Any, prefix: str, layer: int, config: MixerConfig) -> Any:
        """The same steps as `forward`, in the exporters' vocabulary."""
        repeat, d = config.state_heads // config.num_kv_heads, config.head_dim
        q, k, v = graph.linears(x, [f"{prefix}.{n}" for n in ("q_proj", "k_proj", "v_proj")])
        if config.qk_norm:
            q, k = graph.head_norm(q, f"{prefix}.q_norm"), graph.head_norm(k, f"{prefix}.k_norm")
        if config.lawcat.position == "rope":
            q, k = graph.rope(q, layer), graph.rope(k, layer)
        g = graph.log_decay(x, f"{prefix}.gate_down", f"{prefix}.gate_up")
        if repeat > 1:
            k, v = graph.repeat_heads(k, d, repeat), graph.repeat_heads(v, d, repeat)
            g = graph.repeat_heads(g, config.state_rows, repeat)
        if config.lawcat.conv:
            q, k = graph.causal_conv(q, k, f"{prefix}.conv_q", f"{prefix}.conv_k", layer)
        q, k = graph.feature_map(q, k, f"{prefix}.feature_map")
        y = graph.linear_attention(q, k, v, g, layer)
        return graph.linears(y, [f"{prefix}.o_proj"])[0]


class _Taps(nn.Module):
    """A named weight without a forward of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


def _gate_bias(config: MixerConfig) -> torch.Tensor:
    """Initial biases of one head's rows: each half of the features covers every time scale."""
    options = config.lawcat
    reach = options.gate_bias_span / 2
    low, high = options.gate_bias_init - reach, options.gate_bias_init + reach
    half = torch.linspace(low, high, config.feature_dim)
    return torch.cat((half, half.flip(0)))


def _identity_taps(channels: int, size: int) -> torch.Tensor:
    taps = torch.full((channels, size), IDENTITY_TAP)
    taps[:, -1] = 1.0
    return taps
