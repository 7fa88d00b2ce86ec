"""The decoder's own configuration; `edgekit.sources` parses foreign ones into it."""

from dataclasses import dataclass, field, replace
from typing import Literal

from edgekit.errors import UnsupportedError, UsageError
from edgekit.models.spin import SpinConfig

__all__ = ["DecoderConfig", "LawcatConfig", "LolcatsConfig", "RopeConfig"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
INDICATOR_COLUMNS = 8  # of cached values under SPIN: one is read, eight keep attention fast


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its context extension.

    `linear` divides every frequency by `factor`; `llama3` divides only the low ones, with a smooth
    ramp between `original_context / low_freq_factor` and `original_context / high_freq_factor`.

    Attributes:
        mrope_section: how many of the head_dim / 2 frequencies turn by the time, the height and the
            width of a position that has all three (M-RoPE, arXiv 2409.12191); None: a position is
            one number.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    mrope_section: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LawcatConfig:
    """Shape and initialisation of the LAWCAT mixer (arXiv 2509.18467).

    Attributes:
        state_sharing: `q_head` keeps one state per query head (the paper); `kv_head` one per KV
            head.
        feature_dim: f, columns of the feature matrix; the map has F = 2 f features. None: head_dim
            / 2.
        conv_size: taps of the causal convolution on q and k.
        gate_rank: inner width of the low-rank gate.
        gate_divisor: g = logsigmoid(a) / gate_divisor.
        gate_floor: g is never below this, so that a chunk's cumulative decay stays inside fp32 and
            one mid-chunk anchor suffices; -2.5 is reached at a gate logit of -40.
        gate_bias_init: 0 is the paper's (half-life 16 tokens); 4 gives 611 tokens.
        gate_bias_span: the rows of a state start evenly spread over `gate_bias_init` plus or minus
            half of this, so that each head remembers at many time scales; 0 is the paper's.
        position: `none`, or `rope` to rotate q and k before the convolution.
        eps: added to the denominator.
        conv: False leaves the convolution on q and k out: an ablation.
        normaliser: False replaces the denominator by F^1/2 (plain gated linear attention): an
            ablation.
    """

    state_sharing: Literal["q_head", "kv_head"] = "q_head"
    feature_dim: int | None = None
    conv_size: int = 4
    gate_rank: int = 16
    gate_divisor: float = 16.0
    gate_floor: float = -2.5
    gate_bias_init: float = 0.0
    gate_bias_span: float = 0.0
    position: Literal["none", "rope"] = "none"
    eps: float = 1e-6
    conv: bool = True
    normaliser: bool = True

    def __post_init__(self) -> None:
        """Check the ranges that the chunked form relies on."""
        if not -2.5 <= self.gate_floor < 0:
            raise UsageError(
                f"gate_floor {self.gate_floor} given; allowed: -2.5 up to, not including, 0"
            )
        if self.conv_size < 2:
            raise UsageError(f"conv_size {self.conv_size} given; allowed: 2 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class LolcatsConfig:
    """Shape and initialisation of the LoLCATs mixer (arXiv 2410.10254).

    Attributes:
        window: w, keys that softmax sees, the current token's among them.
        feature_dim: f, columns of the feature matrices; the maps have F = 2 f features. None:
            head_dim.
        window_factor_init: the window's weight is sigmoid of this; -2.2 gives 0.1.
        eps: added to the mass of the linear part.
        common_scale: whether window and linear part share one scale; False subtracts the largest
            logit from the window alone, as the authors' code does.
    """

    window: int = 64
    feature_dim: int | None = None
    window_factor_init: float = -2.2
    eps: float = 1e-12
    common_scale: bool = True

    def __post_init__(self) -> None:
        """Check that there is a window."""
        if self.window < 1:
            raise UsageError(f"window {self.window} given; allowed: 1 or more")

    def features(self, head_dim: int) -> int:
        """F = 2 f: features, and rows of the linear state."""
        return 2 * (self.feature_dim or head_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """A pre-norm decoder with rotary attention, a gated MLP and a token mixer chosen per layer.

    Attributes:
        family: which foreign family it came from; kept for `config.json`, never branched on for
            maths.
        head_dim: width of one head; need not be hidden_size / num_heads.
        qk_norm: RMS norm over each head of q and k (Qwen3, Gemma3).
        embedding_scale: what the embeddings of tokens are multiplied with; embeddings that are
            given, those of images among them, come as they are to be read.
        activation: of the MLP's gate; `gelu_tanh` is GELU in its tanh approximation.
        sandwich_norms: what the mixer and the MLP return is normed too, before its residual sum
            (Gemma3).
        attention_scale: what q k^T is multiplied with; None: head_dim^-0.5.
        sliding_layers: the layers whose softmax sees `sliding_window` keys, the query's own among
            them; the others see all.
        sliding_window: None only where no layer slides.
        local_rope: how sliding layers rotate; None: as the others do.
        context_length: positions a softmax layer may see: the model's limit or, in families whose
            windows are no masks here, its sliding window.
        mixers: registry key of each layer's token mixer.
        reads: token ids, or embeddings where images have theirs among those of tokens.
        image_attention: `bidirectional` lets the tokens of an image see each other in softmax
            layers, whatever their order and the window. An image is a run of image tokens of one
            call: text must lie between two images, and no image may be cut across calls.
        image_flag: where images lie is read from one more channel of the embeddings, which is 1
            there, and not from an input of its own: for runtimes that know no such input.
        image_input: the OpenVINO graph's name of that input, for runtimes that know another one.
        spin: heads turned down by how far they look at the image; None, also where one is given
            that changes nothing and `spin_scores` does not ask for it: all count alike.
        spin_scores: whether graphs answer how far the heads of `spin` look at the image, too; its
            `suppress` may be 0 then.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embedding_scale: float = 1.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    sandwich_norms: bool = False
    attention_scale: float | None = None
    sliding_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    local_rope: RopeConfig | None = None
    tied_head: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    mixers: tuple[str, ...] = ()
    lawcat: LawcatConfig = field(default_factory=LawcatConfig)
    lolcats: LolcatsConfig = field(default_factory=LolcatsConfig)
    reads: Literal["tokens", "embeddings"] = "tokens"
    image_attention: Literal["causal", "bidirectional"] = "causal"
    image_flag: bool = False
    image_input: Literal["spin_image_mask", "token_type_ids"] = "spin_image_mask"
    spin: SpinConfig | None = None
    spin_scores: bool = False

    def __post_init__(self) -> None:
        """Fill the mixers in (softmax everywhere) and check that the sizes fit together."""
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if not self.mixers:
            object.__setattr__(self, "mixers", ("softmax",) * self.num_layers)
        if len(self.mixers) != self.num_layers:
            raise UsageError(f"{len(self.mixers)} mixers given for {self.num_layers} layers")
        sections = self.rope.mrope_section
        if sections is not None and sum(sections) != self.head_dim // 2:
            raise UsageError(
                f"mrope_section {sections} given; allowed: sizes of {self.head_dim // 2} in all, "
                "half of head_dim"
            )
        self._check_windows()
        if self.image_flag and self.reads != "embeddings":
            raise UsageError("image_flag given for token ids; it is a channel of embeddings")
        if self.spin is not None:
            self._check_spin(self.spin)
            if self.spin.inert(self.num_heads) and not self.spin_scores:
                object.__setattr__(self, "spin", None)
        if self.spin_scores:
            self._check_scores()

    def _check_windows(self) -> None:
        if any(not 0 <= layer < self.num_layers for layer in self.sliding_layers):
            raise UsageError(
                f"sliding_layers {self.sliding_layers} given; allowed: 0 to {self.num_layers - 1}"
            )
        if self.sliding_layers and (self.sliding_window or 0) < 1:
            raise UsageError(f"sliding_window {self.sliding_window} given; allowed: 1 or more")

    def _check_spin(self, spin: SpinConfig) -> None:
        spin.kept(self.num_heads)
        chosen = {self.mixers[layer] for layer in spin.chosen(self.num_layers)}
        if spin.score == "logit" and chosen != {"softmax"}:
            raise UnsupportedError(
                "spin score 'logit' is a sum of softmax logits, which "
                f"{' and '.join(sorted(chosen - {'softmax'}))} layers do not have; leave them out "
                "of spin.layers, or score by 'mass'"
            )
        sliding = set(self.sliding_layers).intersection(spin.chosen(self.num_layers))
        if spin.score == "logit" and sliding:
            raise UnsupportedError(
                "spin score 'logit' sums every image key, and sliding layers such as "
                f"{min(sliding)} forget them; leave them out of spin.layers, or score by 'mass'"
            )
        if "lawcat" in chosen and not self.lawcat.normaliser:
            raise UsageError("SPIN reads the share of a LAWCAT head from its normaliser; keep it")

    def _check_scores(self) -> None:
        if self.spin is None:
            raise UsageError(
                "spin_scores given without spin; give one, whose suppress may be 0 heads"
            )
        if self.spin.score != "mass":
            raise UsageError(
                f"spin_scores given with the spin score {self.spin.score!r}, which is no share of "
                "attention; score by 'mass'"
            )

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def logit_scale(self) -> float:
        """What q k^T is multiplied with."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """Keys that softmax sees in a layer, the query's own among them; None: all."""
        return self.sliding_window if layer in self.sliding_layers else None

    def rope_of(self, layer: int) -> RopeConfig:
        """How a layer rotates."""
        local = self.local_rope if layer in self.sliding_layers else None
        return self.rope if local is None else local

    @property
    def feature_dim(self) -> int:
        """f: columns of LAWCAT's feature matrix per head."""
        return self.lawcat.feature_dim or self.head_dim // 2

    @property
    def state_rows(self) -> int:
        """F = 2 f: features, and rows of the LAWCAT state."""
        return 2 * self.feature_dim

    @property
    def state_heads(self) -> int:
        """Heads that own a LAWCAT state: query heads or KV heads."""
        return self.num_heads if self.lawcat.state_sharing == "q_head" else self.num_kv_heads

    @property
    def value_columns(self) -> int:
        """Columns of the exported state: values, normaliser, indicator, padding to 8."""
        indicator = int(self.spin is not None and self.spin.score == "mass")
        return -(-(self.head_dim + 1 + indicator) // 8) * 8

    def is_gated(self, layer: int) -> bool:
        """Whether SPIN turns down heads of this layer."""
        return self.spin is not None and layer in self.spin.chosen(self.num_layers)

    def sums_keys(self, layer: int) -> bool:
        """Whether SPIN scores the heads of this softmax layer by a running sum of image keys."""
        return self.is_gated(layer) and self.spin is not None and self.spin.score == "logit"

    def cached_width(self, layer: int) -> int:
        """Columns of a softmax layer's exported values: the head, and SPIN's indicator."""
        marked = self.is_gated(layer) and not self.sums_keys(layer)
        return self.head_dim + INDICATOR_COLUMNS * marked

    @property
    def reads_images(self) -> bool:
        """Whether any layer asks which tokens belong to an image."""
        looks = self.image_attention == "bidirectional" and "softmax" in self.mixers
        return looks or self.spin is not None

    @property
    def needs_positions(self) -> bool:
        """Whether any layer reads absolute positions."""
        rotated = {"softmax", "lolcats"} | ({"lawcat"} if self.lawcat.position == "rope" else set())
        return not rotated.isdisjoint(self.mixers)

    @property
    def context_limit(self) -> int | None:
        """Tokens a sequence may have; None where no layer keeps keys and values."""
        return self.context_length if "softmax" in self.mixers else None

    def with_mixers(
        self,
        mixers: tuple[str, ...],
        lawcat: LawcatConfig | None = None,
        lolcats: LolcatsConfig | None = None,
    ) -> "DecoderConfig":
        """The same decoder with other token mixers."""
        return replace(
            self,
            mixers=mixers,
            lawcat=lawcat or self.lawcat,
            lolcats=lolcats or self.lolcats,
        )
