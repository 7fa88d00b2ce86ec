"""The decoder in PyTorch: what is trained, and what every exported graph is checked against.

Module and tensor names are those of a Hugging Face Llama checkpoint. B batch, T time, D hidden
width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from edgekit.errors import UsageError
from edgekit.mixers.base import Form, MixerContext, Rotation, State, TokenMixer, mixer_type
from edgekit.models.config import DecoderConfig, RopeConfig
from edgekit.models.rope import apply_rope, rope_tables
from edgekit.models.weights import MemoryStore, OverlayStore, WeightStore

__all__ = [
    "Decoder",
    "DecoderLayer",
    "image_mass",
    "step_context",
    "streamed_logits",
    "with_fresh_mixers",
]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class Embedding(nn.Embedding):
    """The embeddings of tokens, scaled."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self._scale = config.embedding_scale

    def reset_parameters(self) -> None:
        """Draw rows where there are any: a draw on `meta` is nothing, and imports a compiler."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[B, T]` to `[B, T, D]`."""
        rows = super().forward(ids)
        return rows if self._scale == 1 else rows * self._scale


class Mlp(nn.Module):
    """Feed-forward with a gate (SwiGLU or GEGLU, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self._active = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(d, inner, bias=bias)
        self.up_proj = nn.Linear(d, inner, bias=bias)
        self.down_proj = nn.Linear(inner, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        y: torch.Tensor = self.down_proj(self._active(self.gate_proj(x)) * self.up_proj(x))
        return y


class DecoderLayer(nn.Module):
    """Pre-norm mixer and feed-forward, each with a residual.

    In a sandwich, `post_attention_layernorm` norms what the mixer returns; elsewhere it stands
    before the feed-forward. Names are those of the checkpoints.
    """

    self_attn: TokenMixer

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        """Build layer `layer` with the mixer that `config` names for it."""
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = mixer_type(config.mixers[layer])(config)
        if config.is_gated(layer):
            self.self_attn.spin = config.spin
        self.self_attn.window = config.window(layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._sandwiched = config.sandwich_norms
        if self._sandwiched:
            self.pre_feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.post_feedforward_layernorm = nn.RMSNorm(
                config.hidden_size, eps=config.rms_norm_eps
            )
        self.mlp = Mlp(config)

    def forward(
        self, x: torch.Tensor, context: MixerContext, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """`[B, T, D]` to `[B, T, D]`, and the mixer's state after it."""
        mixed, after = self.self_attn(self.input_layernorm(x), context, state)
        return self.after_mixer(x, mixed), after

    def after_mixer(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's output, from its input and from what the mixer returned, `[B, T, D]` each."""
        if self._sandwiched:
            x = x + self.post_attention_layernorm(mixed)
            y = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        else:
            x = x + mixed
            y = self.mlp(self.post_attention_layernorm(x))
        after: torch.Tensor = x + y
        return after


class _Trunk(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Decoder(nn.Module):
    """A whole language model; call it on token ids, or on embeddings where images have theirs.

    Example:
        >>> decoder = Decoder.from_store(config, store)            # doctest: +SKIP
        >>> logits, state = decoder(ids)                           # doctest: +SKIP
        >>> logits, state = decoder(next_ids, state=state)         # doctest: +SKIP
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Build the modules, uninitialised by any checkpoint."""
        super().__init__()
        self.config = config
        self.model = _Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def layers(self) -> list[DecoderLayer]:
        """From the first to the last."""
        return cast("list[DecoderLayer]", list(self.model.layers))

    @classmethod
    def from_store(cls, config: DecoderConfig, store: WeightStore) -> "Decoder":
        """Load every tensor from `store` as fp32, bit for bit where the store holds fp32."""
        with torch.device("meta"):
            decoder = cls(config)
        names = [
            n for n in decoder.state_dict() if not (config.tied_head and n == "lm_head.weight")
        ]
        tensors = {name: store.tensor(name).float().clone() for name in names}
        decoder.load_state_dict(tensors, strict=False, assign=True)
        if config.tied_head:
            decoder.lm_head.weight = decoder.model.embed_tokens.weight
        return decoder.eval()

    def forward(
        self,
        given: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        state: list[State] | None = None,
        form: Form = "chunked",
        masses: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, list[State]]:
        """Logits of every position.

        Args:
            given: token ids `[B, T]`, or embeddings `[B, T, D]`.
            mask: 1 for tokens, 0 for padding, over everything so far `[B, S]`, S >= T; None: no
                padding.
            image: which of these T belong to an image, bool `[B, T]`, for SPIN and for attention
                within images; None: none.
            positions: of these T, int64 `[B, T]`, or `[3, B, T]` with M-RoPE; None: tokens are
                counted. With M-RoPE they must be given from the first image of a sequence on,
                since what follows an image does not go on from the count.
            state: what an earlier call returned.
            form: which form a recurrent mixer computes.
            masses: a list to which each layer that SPIN gates by mass adds its heads' shares of the
                image, fp32 `[B, T, H]`; `image_mass` is their mean. None: nobody asks.

        Returns:
            fp32 logits `[B, T, V]` and the state of each layer.
        """
        hidden, after = self.hidden(
            given,
            mask=mask,
            image=image,
            positions=positions,
            state=state,
            form=form,
            masses=masses,
        )
        return self.lm_head(hidden).float(), after

    def hidden(
        self,
        given: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        state: list[State] | None = None,
        form: Form = "chunked",
        masses: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, list[State]]:
        """What the head reads, `[B, T, D]` after the last norm; arguments of `forward`."""
        time = given.shape[1]
        total = time + _position(state) if mask is None else mask.shape[1]
        context = step_context(self.config, time, total, mask, form, given.device, image, positions)
        context = replace(context, masses=masses)
        x = given if given.is_floating_point() else self.model.embed_tokens(given)
        after = []
        for i, layer in enumerate(self.layers):
            x, layer_state = layer(x, context, None if state is None else state[i])
            after.append({**layer_state, "position": torch.tensor(total)})
        return self.model.norm(x), after


def image_mass(masses: Sequence[torch.Tensor]) -> torch.Tensor:
    """The share of its attention that each position spends on images, `[B, T]`.

    Args:
        masses: what `Decoder.forward` left of each gated layer, `[B, T, H]`, one or more.
    """
    return torch.stack(tuple(masses)).mean(dim=(0, 3))


def _position(state: list[State] | None) -> int:
    return 0 if state is None else int(state[0]["position"])


def step_context(
    config: DecoderConfig,
    time: int,
    total: int,
    mask: torch.Tensor | None,
    form: Form,
    device: torch.device | None = None,
    image: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> MixerContext:
    """What the layers share while they read `time` tokens, the last of `total` so far.

    Args:
        config: the decoder's.
        time: tokens of this step, T.
        total: tokens so far, S >= T.
        mask: 1 for tokens, 0 for padding, `[B, S]`; None: no padding.
        form: which form a recurrent mixer computes.
        device: where the tokens are; None: the CPU, or where the mask is.
        image: which of the `time` tokens belong to an image, bool `[B, T]`; None: none.
        positions: of the `time` tokens, `[B, T]` or, with M-RoPE, `[3, B, T]`; None: their count.

    Raises:
        UsageError: for positions of three axes without M-RoPE.
    """
    if positions is None:
        every = torch.arange(total, device=device)[None]
        steps = every if mask is None else (mask.cumsum(dim=1) - 1).clamp_min(0)
        positions = steps[:, total - time :]
    elif positions.dim() == 3 and config.rope.mrope_section is None:
        raise UsageError(
            f"positions {list(positions.shape)} given; allowed: [B, T], since this model's rotary "
            "embedding has no mrope_section"
        )
    local = config.local_rope
    return MixerContext(
        rotate=_rotation(config.rope, config.head_dim, positions),
        local_rotate=None if local is None else _rotation(local, config.head_dim, positions),
        mask=None if mask is None else mask[:, total - time :],
        past_mask=mask,
        image=image,
        form=form,
    )


def _rotation(rope: RopeConfig, head_dim: int, positions: torch.Tensor) -> Rotation:
    cos, sin = rope_tables(rope, head_dim, positions)
    return lambda x: apply_rope(x, cos, sin)


def with_fresh_mixers(config: DecoderConfig, store: WeightStore) -> WeightStore:
    """`store` plus untrained tensors for every mixer that the checkpoint does not know."""
    fresh = {
        f"model.layers.{layer}.self_attn.{name}": tensor
        for layer, mixer in enumerate(config.mixers)
        for name, tensor in mixer_type(mixer).fresh_tensors(config, layer).items()
    }
    missing = {name: tensor for name, tensor in fresh.items() if name not in store}
    return OverlayStore(MemoryStore(missing), store)


@torch.inference_mode()
def streamed_logits(
    config: DecoderConfig,
    store: WeightStore,
    given: torch.Tensor,
    *,
    image: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    form: Form = "chunked",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits `[B, T, V]`, computed in `dtype`, one layer's weights at a time.

    Args:
        config: the decoder's.
        store: its tensors.
        given: token ids `[B, T]`, or embeddings `[B, T, D]`.
        image: which tokens belong to an image, bool `[B, T]`; None: none.
        positions: `[B, T]` or, with M-RoPE, `[3, B, T]`; None: the count of tokens.
        form: which form a recurrent mixer computes.
        dtype: of the arithmetic.
    """
    time = given.shape[1]
    context = step_context(config, time, time, None, form, given.device, image, positions)
    table = store.tensor("model.embed_tokens.weight")
    if given.is_floating_point():
        x = given.to(dtype)
    else:
        x = functional.embedding(given, table).to(dtype) * config.embedding_scale
    for i in range(config.num_layers):
        x, _ = _loaded_layer(config, store, i, dtype)(x, context)
    x = functional.rms_norm(
        x, (config.hidden_size,), store.tensor("model.norm.weight").to(dtype), config.rms_norm_eps
    )
    head = table if config.tied_head else store.tensor("lm_head.weight")
    return functional.linear(x, head.to(dtype))


def _loaded_layer(
    config: DecoderConfig, store: WeightStore, layer: int, dtype: torch.dtype
) -> DecoderLayer:
    with torch.device("meta"):
        module = DecoderLayer(config, layer)
    prefix = f"model.layers.{layer}."
    tensors = {name: store.tensor(prefix + name).to(dtype) for name in module.state_dict()}
    module.load_state_dict(tensors, assign=True)
    return module.eval()
