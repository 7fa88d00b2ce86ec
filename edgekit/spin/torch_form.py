"""SPIN in any vision-language model of transformers whose attention goes through its registry.

The model's own attention stays: what it returns for a head, before the output projection, is
multiplied as `kernels/head_gate` says. Whether a key belongs to an image is read from the token ids
of each call and kept beside the cache.

Example:
    >>> with apply(model, SpinConfig(suppress=2)):                   # doctest: +SKIP
    ...     model.generate(**inputs)
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from edgekit.errors import UnsupportedError, UsageError
from edgekit.kernels.head_gate.reference import gated_queries, head_factors
from edgekit.models.spin import SpinConfig
from edgekit.spin.scores import logit_score, mass_score, visible_keys

__all__ = ["Observer", "Spin", "apply", "attention_modules"]

# Called with a layer, its scores [B, T, H] and the gated queries [B, T].
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]

NAME = "edgekit_spin"  # among transformers' attention implementations
HANDLE = "_edgekit_spin"  # on an attention module: the `Spin` that it obeys
TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
PIXELS = ("pixel_values", "pixel_values_videos", "image_hidden_states", "image_embeds")
SCORES = {"mass": mass_score, "logit": logit_score}


class Spin:
    """SPIN at work in a model, until `remove()` or the end of a `with`; `apply` makes it.

    Attributes:
        config: its settings; another may be set at any time between two calls of the model.
        ranking: what the heads are ranked by, out of their scores `[B, T, H]`; None: the scores.
            Experiments have controls here.
    """

    def __init__(self, model: PreTrainedModel, config: SpinConfig) -> None:
        """See `apply`."""
        self._text = model.config.get_text_config(decoder=True)
        self._modules = attention_modules(model)
        if any(hasattr(module, HANDLE) for module in self._modules):
            raise UsageError("SPIN is already on in this model; change its config, or remove() it")
        self._tokens = config.image_token_ids or _image_tokens(model.config)
        self._signature = inspect.signature(model.forward)
        self._image: torch.Tensor | None = None  # bool [B, keys so far]
        self._given: torch.Tensor | None = None
        self._observers: list[Observer] = []
        self.ranking: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._before = self._text._attn_implementation
        self.config = config
        for module in self._modules:
            setattr(module, HANDLE, self)
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)
        self._text._attn_implementation = NAME

    @property
    def config(self) -> SpinConfig:
        """The settings in force."""
        return self._config

    @config.setter
    def config(self, config: SpinConfig) -> None:
        config.kept(self._text.num_attention_heads)
        self._layers = config.chosen(self._text.num_hidden_layers)
        self._config = config

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        for module in self._modules:
            if getattr(module, HANDLE, None) is self:
                delattr(module, HANDLE)
        self._text._attn_implementation = self._before

    def __enter__(self) -> "Spin":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def given(self, image: torch.Tensor) -> None:
        """Say where images lie in the next call, which is given embeddings and no token ids.

        Args:
            image: bool `[B, T]`.
        """
        self._given = image

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Show the scores of every gated layer to `observer` while the context lasts."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        output: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """What attention returned, with some heads turned down.

        Args:
            module: the attention's.
            query: `[B, H, T, D]`.
            key: `[B, G, L, D]`, the cache's and this call's.
            output: `[B, T, H, D]`.
            mask: of the attention.
            scale: of the logits.

        Returns:
            `[B, T, H, D]`; `output` itself where no image was seen.
        """
        config, image = self._config, self._image
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if image is None or layer not in self._layers or not bool(image.any()):
            return output
        keys = key.shape[2]
        start = min(image.shape[1], keys) - query.shape[2]
        image = _aligned(image, keys)
        visible = visible_keys(mask, query.shape[2], keys, key.device)
        sees = (visible[:, 0] & image[:, None]).any(dim=-1)
        gate = gated_queries(sees, image[:, start : start + query.shape[2]], config.queries)
        scores = SCORES[config.score](query, key, image, visible, scale).mT
        for observer in self._observers:
            observer(layer, scores, gate)
        scores = scores if self.ranking is None else self.ranking(scores)
        kept = config.kept(query.shape[1])
        factors = head_factors(scores, gate, kept, config.alpha, config.lowering)
        return output * factors[..., None].to(output.dtype)

    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each call of the model: which of its tokens belong to an image."""
        call = self._signature.bind_partial(*args, **kwargs).arguments
        call = {**call, **call.get("kwargs", {})}
        now = self._tokens_of_images(call)
        cache = call.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        earlier = now.new_zeros(now.shape[0], past) if self._image is None else self._image
        if past and earlier.shape[0] != now.shape[0]:
            raise UsageError(
                f"{now.shape[0]} rows given after {earlier.shape[0]}; a cache goes on with its rows"
            )
        self._image = torch.cat((earlier[:, :past], now), dim=1) if past else now

    def _tokens_of_images(self, call: Mapping[str, Any]) -> torch.Tensor:
        if self._given is not None:
            given, self._given = self._given, None
            return given
        ids = call.get("input_ids")
        if ids is None:
            raise UsageError("embeddings given without token ids; say where images lie: given()")
        if all(call.get(name) is None for name in PIXELS):  # a generated id stands for no image
            return torch.zeros_like(ids, dtype=torch.bool)
        return torch.isin(ids, torch.tensor(self._tokens, device=ids.device))


def apply(model: PreTrainedModel, config: SpinConfig) -> Spin:
    """Turn SPIN on in a vision-language model of transformers.

    Args:
        model: `LlavaForConditionalGeneration` and the like, with scaled-dot-product attention.
        config: what to suppress.

    Returns:
        A handle that turns it off again, at the latest at the end of a `with`.

    Raises:
        UnsupportedError: for a model without image tokens or whose attention cannot be reached.
        UsageError: for layers or heads that the model does not have, or SPIN applied twice.
    """
    return Spin(model, config)


def _aligned(image: torch.Tensor, keys: int) -> torch.Tensor:
    """Indicators of `keys` keys, `[B, keys]`, where the cache keeps more or fewer than were seen.

    A static cache has free places at its end; that of a sliding window has dropped the first keys.
    """
    free = keys - image.shape[1]
    return nn.functional.pad(image, (0, free)) if free >= 0 else image[:, -keys:]


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of the text decoder.

    Raises:
        UnsupportedError: if they cannot be reached.
    """
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation not in ("sdpa", NAME):
        raise UnsupportedError(
            f"attention {text._attn_implementation!r} of the text decoder; SPIN needs 'sdpa': "
            "model.set_attn_implementation('sdpa')"
        )
    found = [
        module
        for module in model.modules()
        if getattr(module, "config", None) is text
        and hasattr(module, "layer_idx")
        and hasattr(module, "head_dim")
    ]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention that SPIN can reach; known to work: LLaVA, "
            "Qwen2-VL, SmolVLM, Gemma3"
        )
    return found


def _image_tokens(config: Any) -> tuple[int, ...]:
    """The tokens that stand for images and videos.

    Raises:
        UnsupportedError: if the model has none.
    """
    named = [getattr(config, field, None) for field in TOKEN_FIELDS]
    found = tuple(dict.fromkeys(token for token in named if token is not None))
    if not found:
        raise UnsupportedError(
            f"{config.model_type}: its config names no image token, and SPIN has nothing to do "
            "without images; give image_token_ids"
        )
    return found


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    spin: Spin | None = getattr(module, HANDLE, None)
    if spin is None:
        return output, None
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return spin.attention(module, query, key, output, attention_mask, scale), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
