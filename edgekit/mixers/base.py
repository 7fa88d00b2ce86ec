"""What every token mixer offers: a module to train, and a description to export.

A mixer is one file of this folder; its name is the registry key, and it holds `Mixer`, a subclass
of `TokenMixer`, under exactly that name.
"""

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

import edgekit.mixers
from edgekit.errors import UsageError
from edgekit.kernels.head_gate.reference import SEEN, gated_queries, head_factors
from edgekit.mixers.graph import Graph

__all__ = [
    "MixerContext",
    "State",
    "TokenMixer",
    "image_tokens",
    "mixer_names",
    "mixer_type",
]

State = dict[str, torch.Tensor]
Form = Literal["parallel", "chunked", "recurrent"]
Rotation = Callable[[torch.Tensor], torch.Tensor]
NOT_MIXERS = ("base", "graph")


class MixerConfig(Protocol):
    """What a mixer reads of `models.config.DecoderConfig`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def o_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def feature_dim(self) -> int: ...
    @property
    def state_rows(self) -> int: ...
    @property
    def state_heads(self) -> int: ...
    @property
    def lawcat(self) -> Any: ...
    @property
    def lolcats(self) -> Any: ...
    @property
    def attention_scale(self) -> float | None: ...
    @property
    def logit_scale(self) -> float: ...
    @property
    def image_attention(self) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MixerContext:
    """What a step of the whole decoder shares between its layers.

    Attributes:
        rotate: rotates `[B, T, H, d]` by the positions of this step.
        local_rotate: the same in sliding layers; None: they rotate as the others do.
        mask: 1 for the tokens of this step, 0 for padding, `[B, T]`; None when nothing is padded.
        past_mask: the same for all tokens so far, `[B, S]`, S >= T; None when nothing is padded.
        image: which tokens of this step belong to an image, bool `[B, T]`; None: none.
        form: which of a recurrent mixer's equal forms to compute.
        masses: where gated layers leave the shares of attention that their heads spend on images,
            fp32 `[B, T, H]` each; None: nobody asks.
    """

    rotate: Rotation
    local_rotate: Rotation | None = None
    mask: torch.Tensor | None = None
    past_mask: torch.Tensor | None = None
    image: torch.Tensor | None = None
    form: Form = "chunked"
    masses: list[torch.Tensor] | None = None


class TokenMixer(nn.Module):
    """Mixes information across time; stands where a transformer has its self-attention.

    Attributes:
        spin: how this layer's heads are turned down (`models.spin.SpinConfig`); None: they are not.
        window: keys that softmax sees in this layer if it slides, the query's own among them; None:
            it does not slide.
    """

    spin: Any = None
    window: int | None = None

    def __init__(self, config: MixerConfig) -> None:
        """Create the teacher's four projections, under the teacher's names."""
        super().__init__()
        self.config = config
        query, value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, value, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, value, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project `x [B, T, D]` to q `[B, T, H, d]`, k and v `[B, T, Hkv, d]`, normed."""
        d = self.config.head_dim
        q, k, v = (p(x).unflatten(-1, (-1, d)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return (self.q_norm(q), self.k_norm(k), v) if self.config.qk_norm else (q, k, v)

    def rotated(self, x: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Heads `[B, T, H, d]` at their positions."""
        if self.window is None or context.local_rotate is None:
            return context.rotate(x)
        return context.local_rotate(x)

    def forward(
        self, x: torch.Tensor, context: MixerContext, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Mix `x [B, T, D]`, continuing from `state`; returns `[B, T, D]` and the new state."""
        heads, after = self.mix(x, context, state)
        return self.o_proj(heads), after

    def marked(self, v: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Values `[B, T, heads, d]` with one more column where SPIN asks: 1 on image tokens.

        What a head returns in that column is the share of its weight that image tokens have.
        """
        if self.spin is None or self.sums_keys:
            return v
        image = image_tokens(v, context).to(v.dtype)
        return torch.cat((v, image[..., None, None].expand(*v.shape[:3], 1)), dim=-1)

    @property
    def sums_keys(self) -> bool:
        """Whether heads are scored by a sum of image keys, and not by the column of `marked`."""
        return self.spin is not None and self.spin.score == "logit"

    def gated(
        self,
        y: torch.Tensor,
        context: MixerContext,
        looks: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The heads, turned down where SPIN asks, side by side `[B, T, H d]`.

        Args:
            y: `[B, T, H, d]`, or with the column of `marked`.
            context: of this step.
            looks: how far heads look at the image, `[B, T, H]`, and whether a query sees one, bool
                `[B, T]`; None: what the column says.
        """
        if self.spin is None:
            return y.flatten(2)
        if looks is None:
            y, mass = y[..., :-1], y[..., -1]
            looks = mass, mass.sum(dim=-1) > SEEN
            if context.masses is not None:
                context.masses.append(mass.float())
        if self.spin.inert(y.shape[2]):
            return y.flatten(2)
        scores, sees = looks
        gate = gated_queries(sees, image_tokens(y, context), self.spin.queries)
        kept = self.spin.kept(y.shape[2])
        factors = head_factors(scores, gate, kept, self.spin.alpha, self.spin.lowering)
        return (y * factors[..., None].to(y.dtype)).flatten(2)

    @abstractmethod
    def mix(
        self, x: torch.Tensor, context: MixerContext, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """The heads' outputs side by side, `[B, T, H d]`, before the output projection.

        This is what a student is taught to match (LAWCAT, arXiv 2509.18467, stage 1).
        """

    @staticmethod
    @abstractmethod
    def fresh_tensors(config: MixerConfig, layer: int) -> Mapping[str, torch.Tensor]:
        """Untrained values of the tensors that the teacher lacks, by name in the mixer."""

    @staticmethod
    @abstractmethod
    def describe(graph: Graph[Any], x: Any, prefix: str, layer: int, config: MixerConfig) -> Any:
        """Add this mixer to `graph`: input and result are handles of `[B, T, D]`."""

    def init_from_teacher(self, tensors: Mapping[str, torch.Tensor], layer: int) -> None:
        """Copy a teacher's attention tensors bit for bit and give the new ones their fresh values.

        Args:
            tensors: the teacher's tensors by name inside its attention module (`q_proj.weight`,
                ...).
            layer: the layer's index, which seeds fresh values where they are random.

        Raises:
            RuntimeError: (from torch) if a tensor is missing or has another shape.
        """
        fresh = self.fresh_tensors(self.config, layer)
        self.load_state_dict({**fresh, **tensors}, strict=True)


def image_tokens(x: torch.Tensor, context: MixerContext) -> torch.Tensor:
    """Which tokens of `x [B, T, ...]` belong to an image, bool `[B, T]`."""
    if context.image is None:
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    return context.image.bool()


def mixer_names() -> list[str]:
    """Every registered mixer: the file names of this folder."""
    found = (module.name for module in pkgutil.iter_modules(edgekit.mixers.__path__))
    return sorted(name for name in found if name not in NOT_MIXERS)


def mixer_type(name: str) -> type[TokenMixer]:
    """The mixer class of the file `name`.

    Raises:
        UsageError: if there is no such mixer.
    """
    if name not in mixer_names():
        raise UsageError(f"mixer {name!r} is unknown; known: {', '.join(mixer_names())}")
    mixer: type[TokenMixer] = importlib.import_module(f"edgekit.mixers.{name}").Mixer
    return mixer
