"""Names, shapes and order of the carried tensors of a decoder: the state table of the manifest."""

from typing import Literal

from edgekit.bundle import StateRecord
from edgekit.errors import UnsupportedError
from edgekit.models.config import DecoderConfig

__all__ = [
    "EMBEDDINGS",
    "IMAGE_MASK",
    "POSITIONS",
    "history_channels",
    "input_names",
    "refuse_gate",
    "state_records",
    "value_channels",
]

EMBEDDINGS = "inputs_embeds"  # input: embeddings of tokens and images
IMAGE_MASK = "spin_image_mask"  # input: 1 on the image tokens of a call, else 0
POSITIONS = "position_ids"  # input: [B, T]; time, height and width [3, B, T] with M-RoPE


def state_records(config: DecoderConfig) -> tuple[StateRecord, ...]:
    """One record per carried tensor; -1 stands for the batch and for a growing axis."""
    return tuple(
        record
        for layer, mixer in enumerate(config.mixers)
        for record in RECORDS[mixer](config, layer)
    )


def input_names(config: DecoderConfig) -> tuple[str, ...]:
    """Inputs that both engines' graphs have; `beam_idx` is OpenVINO's own."""
    first = EMBEDDINGS if config.reads == "embeddings" else "input_ids"
    masked = config.reads_images and not config.image_flag
    positions = config.needs_positions
    return (first, "attention_mask", *(config.image_input,) * masked, *(POSITIONS,) * positions)


def _growing(config: DecoderConfig, layer: int) -> list[StateRecord]:
    wide = config.cached_width(layer)  # in ONNX, keys are as wide as values (`onnx_spin.py`)
    kinds: tuple[tuple[Literal["key", "value"], int], ...] = (
        ("key", config.head_dim),
        ("value", wide),
    )
    grown = [
        StateRecord(
            layer=layer,
            kind=kind,
            openvino=f"past_key_values.{layer}.{kind}",
            onnx=(f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"),
            shape=(-1, config.num_kv_heads, -1, width),
            onnx_shape=None if width == wide else (-1, config.num_kv_heads, -1, wide),
        )
        for kind, width in kinds
    ]
    return [*grown, _spin(config, layer)] if config.sums_keys(layer) else grown


def _spin(config: DecoderConfig, layer: int) -> StateRecord:
    """The sum of the image keys so far and, in the last column, how many they are."""
    return StateRecord(
        layer=layer,
        kind="spin",
        openvino=f"past_key_values.{layer}.spin",
        onnx=(f"past_key_values.{layer}.spin", f"present.{layer}.spin"),
        shape=(-1, config.num_kv_heads, config.head_dim + 1),
    )


def _lawcat(config: DecoderConfig, layer: int) -> list[StateRecord]:
    channels = (config.num_heads + config.state_heads) * config.head_dim
    conv = _conv(layer, channels, config.lawcat.conv_size - 1)
    ssm = _ssm(layer, config.state_heads, config.state_rows, config.value_columns)
    return [conv, ssm] if config.lawcat.conv else [ssm]


def _lolcats(config: DecoderConfig, layer: int) -> list[StateRecord]:
    rows = config.lolcats.features(config.head_dim)
    return [
        _conv(layer, history_channels(config), config.lolcats.window),
        _ssm(layer, config.num_heads, rows, config.value_columns),
    ]


def _conv(layer: int, channels: int, columns: int) -> StateRecord:
    return StateRecord(
        layer=layer,
        kind="conv",
        openvino=f"cache_params.past.conv.{layer}",
        onnx=(f"past_key_values.{layer}.conv_state", f"present.{layer}.conv_state"),
        shape=(-1, channels, columns),
    )


def _ssm(layer: int, heads: int, rows: int, columns: int) -> StateRecord:
    return StateRecord(
        layer=layer,
        kind="ssm",
        openvino=f"cache_params.past.ssm.{layer}",
        onnx=(f"past_key_values.{layer}.recurrent_state", f"present.{layer}.recurrent_state"),
        shape=(-1, heads, rows, columns),
    )


RECORDS = {"softmax": _growing, "lawcat": _lawcat, "lolcats": _lolcats}


def refuse_gate(config: DecoderConfig, layer: int) -> None:
    """SPIN is not baked into LoLCATs layers.

    Raises:
        UnsupportedError: if it would have to be.
    """
    if config.is_gated(layer):
        raise UnsupportedError(
            f"layer {layer}: SPIN is baked into softmax and LAWCAT layers, not into "
            f"{config.mixers[layer]}; leave such layers out of spin.layers"
        )


def history_channels(config: DecoderConfig) -> int:
    """Channels of a LoLCATs window: rotated keys, values, and 1 where there is a token."""
    return 2 * config.num_kv_heads * config.head_dim + 1


def value_channels(config: DecoderConfig) -> list[int]:
    """Which of these channels are the value columns of each query head, head after head.

    The values, then the token's 1 in the normaliser's column and, unread, in the padding.
    """
    d, last = config.head_dim, history_channels(config) - 1
    return [
        (config.num_kv_heads + head // config.groups) * d + column if column < d else last
        for head in range(config.num_heads)
        for column in range(config.value_columns)
    ]
