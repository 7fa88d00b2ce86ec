"""LoLCATs: softmax over a window, linear attention over everything older (arXiv 2410.10254).

Per layer: teacher projections; rotation; feature maps of their own for q and for k, one matrix per
query head each (Hedgehog, arXiv 2402.04347); the attention of `kernels/window/reference.py`, where
the window's weight is gamma = sigmoid(window_factor) per query head; the teacher's output
projection. No decay, no convolution. This is the baseline that LAWCAT is compared with.

One difference from the authors' code: window and linear part share one scale
(`LolcatsConfig.common_scale`), so that gamma does not drift with the size of the logits.

State, constant in the sequence length, w window, F features:
    key, value  [B, Hkv, w, d]      the last w tokens, rotated; 0 where there were fewer
    seen        [B, w]              which of them are tokens, bool
    ssm         [B, H, F, d + 1]    everything older, fp32; the last column is its mass
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgekit.kernels.conv_feature.reference import positive_features
from edgekit.kernels.precision import full_precision, widened
from edgekit.kernels.window.reference import chunked_window, parallel_window, recurrent_window
from edgekit.mixers.base import MixerConfig, MixerContext, State, TokenMixer
from edgekit.mixers.graph import Graph

__all__ = ["Mixer"]

FORMS = {"parallel": parallel_window, "chunked": chunked_window, "recurrent": recurrent_window}


class Mixer(TokenMixer):
    """The baseline student: constant memory, recall that fades past the window."""

    def __init__(self, config: MixerConfig) -> None:
        """Add two feature matrices per head and the window's weight to the teacher's tensors."""
        super().__init__(config)
        heads, d = config.num_heads, config.head_dim
        features = config.lolcats.features(d)
        self.feature_map_q = _Weight(heads, d, features // 2)
        self.feature_map_k = _Weight(heads, d, features // 2)
        self.window_factor = _Weight(heads)

    def mix(
        self, x: torch.Tensor, context: MixerContext, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Read `x [B, T, D]` in the form `context.form`; padding is a no-op."""
        q, k, v = self.project(x)
        q, k = self.rotated(q, context), self.rotated(k, context)
        v = self.marked(v, context)
        packing = _Packing.of(context.mask, x)
        q, k, v = (packing.pack(y).transpose(1, 2) for y in (q, k, v))  # [B, heads, T, d]
        before = self._empty(k, v) if state is None else state
        window = {
            "key": torch.cat((before["key"], k), dim=2),
            "value": torch.cat((before["value"], v), dim=2),
            "seen": torch.cat((before["seen"], packing.seen), dim=1),
        }
        y, ssm = self._attend(q, window, before["ssm"], packing, context.form)
        heads = packing.unpack(y.transpose(1, 2))
        return self.gated(heads, context).to(x.dtype), {**packing.recent(window), "ssm": ssm}

    def _attend(
        self, q: torch.Tensor, window: State, ssm: torch.Tensor, packing: "_Packing", form: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From q `[B, H, T, d]`: the output `[B, H, T, d]` and the linear state after."""
        config, options, time = self.config, self.config.lolcats, q.shape[2]
        keys, seen, queries = window["key"], window["seen"], self._grouped(q, 1)
        phi_q = positive_features(queries @ self._grouped(self.feature_map_q.weight, 0))
        older = keys[:, :, None, :time]
        phi_k = positive_features(older @ self._grouped(self.feature_map_k.weight, 0))
        gone = seen[:, :time] & packing.seen  # column j leaves the window with the j-th token
        phi_k = phi_k * gone[:, None, None, :, None]
        with full_precision(q):
            y, after = FORMS[form](
                widened(queries) * config.logit_scale,
                widened(keys),
                widened(window["value"]),
                seen,
                phi_q,
                phi_k,
                functional.logsigmoid(widened(self._grouped(self.window_factor.weight, 0))),
                self._grouped(ssm, 1),
                eps=options.eps,
                common_scale=options.common_scale,
            )
        return y.flatten(1, 2), after.flatten(1, 2)

    def _grouped(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Axis `axis` of query heads as two: KV heads, and query heads of each."""
        heads = (self.config.num_kv_heads, self.config.groups)
        return x.reshape(*x.shape[:axis], *heads, *x.shape[axis + 1 :])

    def _empty(self, k: torch.Tensor, v: torch.Tensor) -> State:
        """The state before the first token."""
        config, options = self.config, self.config.lolcats
        batch, heads, _, d = k.shape
        window, rows, columns = options.window, options.features(d), v.shape[3]
        return {
            "key": k.new_zeros(batch, heads, window, d),
            "value": k.new_zeros(batch, heads, window, columns),
            "seen": torch.zeros(batch, window, dtype=torch.bool, device=k.device),
            "ssm": widened(k).new_zeros(batch, config.num_heads, rows, columns + 1),
        }

    @staticmethod
    def fresh_tensors(config: MixerConfig, layer: int) -> Mapping[str, torch.Tensor]:
        """Rectangular identity maps, and the window's factor of the configuration."""
        options, heads, d = config.lolcats, config.num_heads, config.head_dim
        identity = torch.eye(d, options.features(d) // 2).repeat(heads, 1, 1)
        return {
            "feature_map_q.weight": identity,
            "feature_map_k.weight": identity.clone(),
            "window_factor.weight": torch.full((heads,), options.window_factor_init),
        }

    @staticmethod
    def describe(graph: Graph[Any], x: Any, prefix: str, layer: int, config: MixerConfig) -> Any:
        """The same steps as `forward`, in the exporters' vocabulary."""
        q, k, v = graph.linears(x, [f"{prefix}.{n}" for n in ("q_proj", "k_proj", "v_proj")])
        if config.qk_norm:
            q, k = graph.head_norm(q, f"{prefix}.q_norm"), graph.head_norm(k, f"{prefix}.k_norm")
        y = graph.window_attention(graph.rope(q, layer), graph.rope(k, layer), v, prefix, layer)
        return graph.linears(y, [f"{prefix}.o_proj"])[0]


class _Weight(nn.Module):
    """A named weight without a forward of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


@dataclass(frozen=True, slots=True)
class _Packing:
    """How each row's tokens are moved to its front, so that padding comes last.

    Attributes:
        seen: whether a packed column is a token, `[B, T]`.
        order: the column that each packed one comes from, `[B, T]`; None: nothing is padded.
    """

    seen: torch.Tensor
    order: torch.Tensor | None

    @classmethod
    def of(cls, mask: torch.Tensor | None, x: torch.Tensor) -> "_Packing":
        """The packing of `mask [B, T]`, or none, for inputs like `x [B, T, D]`."""
        if mask is None:
            return cls(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), None)
        padding = ~mask.bool()
        order = padding.to(torch.int8).argsort(dim=1, stable=True)
        return cls(~padding.gather(1, order), order)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """`x [B, T, heads, d]` with the tokens first."""
        return x if self.order is None else _columns(x, self.order)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """Back to the order given."""
        return x if self.order is None else _columns(x, self.order.argsort(dim=1))

    def recent(self, window: State) -> State:
        """Of the `w + T` columns of `window` the w that end with each row's last token."""
        size = window["seen"].shape[1] - self.seen.shape[1]
        tokens = self.seen.sum(dim=1, keepdim=True)
        columns = tokens + torch.arange(size, device=tokens.device)  # [B, w]
        wide = columns[:, None, :, None]
        keys, values = (
            x.gather(2, wide.expand(-1, x.shape[1], -1, x.shape[3]))
            for x in (window["key"], window["value"])
        )
        return {"key": keys, "value": values, "seen": window["seen"].gather(1, columns)}


def _columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The columns `order [B, N]` of `x [B, T, heads, d]`."""
    return x.gather(1, order[..., None, None].expand(-1, -1, *x.shape[2:]))
