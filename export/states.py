"""Names, shapes and order of the carried tensors of a decoder: the state table of the manifest."""

from edgekit.bundle import StateRecord
from edgekit.models.config import DecoderConfig

__all__ = ["input_names", "state_records"]


def state_records(config: DecoderConfig) -> tuple[StateRecord, ...]:
    """One record per carried tensor; -1 stands for the batch and for a growing axis."""
    return tuple(
        record
        for layer, mixer in enumerate(config.mixers)
        for record in (_growing(config, layer) if mixer == "softmax" else _constant(config, layer))
    )


def input_names(config: DecoderConfig) -> tuple[str, ...]:
    """Inputs that both engines' graphs have; `beam_idx` is OpenVINO's own."""
    return ("input_ids", "attention_mask") + ("position_ids",) * config.needs_positions


def _growing(config: DecoderConfig, layer: int) -> list[StateRecord]:
    return [
        StateRecord(
            layer=layer,
            kind=kind,
            openvino=f"past_key_values.{layer}.{kind}",
            onnx=(f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"),
            shape=(-1, config.num_kv_heads, -1, config.head_dim),
        )
        for kind in ("key", "value")
    ]


def _constant(config: DecoderConfig, layer: int) -> list[StateRecord]:
    channels = (config.num_heads + config.state_heads) * config.head_dim
    past, present = f"past_key_values.{layer}", f"present.{layer}"
    conv = StateRecord(
        layer=layer,
        kind="conv",
        openvino=f"cache_params.past.conv.{layer}",
        onnx=(f"{past}.conv_state", f"{present}.conv_state"),
        shape=(-1, channels, config.lawcat.conv_size - 1),
    )
    ssm = StateRecord(
        layer=layer,
        kind="ssm",
        openvino=f"cache_params.past.ssm.{layer}",
        onnx=(f"{past}.recurrent_state", f"{present}.recurrent_state"),
        shape=(-1, config.state_heads, config.state_rows, config.value_columns),
    )
    return [conv, ssm] if config.lawcat.conv else [ssm]
