"""Weight compression and writing of the OpenVINO IR.

fp32 and fp16 are storage formats of the graph's constants; int8 and int4 are NNCF's weight
compression (symmetric: on AVX2 the asymmetric form costs about twice the time). The gate, the
convolution and the feature map of a recurrent layer are never quantised, nor are side paths, and
with int4 the embedding and the head stay at 8 bits.
"""

import contextlib
import io
import logging
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from edgekit.errors import BundleError
from edgekit.export.side_paths import NO_SIDE_PATHS, SidePaths
from edgekit.export.to_openvino import build_openvino
from edgekit.models.config import DecoderConfig
from edgekit.models.weights import WeightStore

__all__ = ["compress_to_int8", "save_ir", "write_openvino"]

NEVER_QUANTISED = [
    ".*self_attn\\.(gate_down|gate_up|feature_map|conv_q|conv_k).*",
    ".*\\.lora_(down|up|A|B)",
]
CALIBRATION_WINDOW = 256
PROBE_BYTES = 1 << 20
COUNTED_NAME = re.compile(r"([A-Z]\w*)_\d+(|\.\d+)")  # as Slice_16277; ours are module paths


def write_openvino(
    config: DecoderConfig,
    weights: WeightStore,
    out: Path,
    *,
    weights_format: str,
    group_size: int = 64,
    calibration: np.ndarray | None = None,
    side: SidePaths = NO_SIDE_PATHS,
) -> None:
    """Write the decoder's graph, `.xml` and `.bin`, into the directory `out`.

    It is `openvino_model`, or `openvino_language_model` where it reads embeddings.

    Args:
        config: the decoder.
        weights: its tensors.
        out: an existing directory.
        weights_format: `fp32`, `fp16`, `int8` or `int4`.
        group_size: input columns per int4 scale.
        calibration: token ids `[N]` for data-aware int4 (AWQ and scale estimation), or None.
        side: low-rank paths beside linear layers; with them, calibration goes without AWQ.

    Raises:
        OSError: if the disk is full.
        BundleError: if OpenVINO cannot write it for another reason.
    """
    file = "openvino_model.xml" if config.reads == "tokens" else "openvino_language_model.xml"
    model = build_openvino(config, weights, half=weights_format == "fp16", side=side)
    if weights_format in ("int8", "int4"):
        settings = _settings(weights_format, group_size, _batches(config, calibration))
        if "awq" in settings:  # it scales activations, which a side path reads unscaled
            settings["awq"] = not side
        _compress(model, settings)
    if weights_format == "fp32":
        model.set_rt_info("f32", ["runtime_options", "KV_CACHE_PRECISION"])
    save_ir(model, out / file)


def compress_to_int8(model: ov.Model) -> None:
    """Round every weight to 8 bits, in place; in int4 bundles too, what is no decoder layer."""
    _compress(model, _settings("int8", 0, []))


def _compress(model: ov.Model, settings: dict[str, Any]) -> None:
    import nncf

    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bar has no switch
        nncf.compress_weights(model, **settings)


def _settings(
    weights_format: str, group_size: int, batches: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Keyword arguments of `nncf.compress_weights`."""
    import nncf

    ignored = nncf.IgnoredScope(patterns=NEVER_QUANTISED, validate=False)
    if weights_format == "int8":
        return {"mode": nncf.CompressWeightsMode.INT8_SYM, "ignored_scope": ignored}
    fallback = nncf.GroupSizeFallbackMode.ADJUST
    settings = {
        "mode": nncf.CompressWeightsMode.INT4_SYM,
        "group_size": group_size,
        "ratio": 1.0,
        "backup_mode": nncf.BackupMode.INT8_SYM,
        "ignored_scope": ignored,
        "advanced_parameters": nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=fallback
        ),
    }
    if batches:
        settings |= {"dataset": nncf.Dataset(batches), "awq": True, "scale_estimation": True}
    return settings


def _batches(config: DecoderConfig, calibration: np.ndarray | None) -> list[dict[str, np.ndarray]]:
    """Windows of the calibration tokens, as inputs of the graph."""
    if calibration is None:
        return []
    count = max(len(calibration) // CALIBRATION_WINDOW, 1)
    return [_inputs(config, window[None]) for window in np.array_split(calibration, count)]


def _inputs(config: DecoderConfig, ids: np.ndarray) -> dict[str, np.ndarray]:
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    if config.needs_positions:
        feed["position_ids"] = np.arange(ids.shape[1], dtype=np.int64)[None]
    return feed


def save_ir(model: ov.Model, path: Path, *, half: bool = False) -> None:
    """Write `path` (.xml) and the .bin beside it.

    Args:
        model: renumbered; it goes on to be usable.
        path: of the .xml.
        half: store fp32 constants in 16 bits; otherwise they keep the precision that they have.

    Raises:
        OSError: if the disk is full.
        BundleError: if OpenVINO cannot write it for another reason.
    """
    _number_afresh(model)
    try:
        ov.save_model(model, path, compress_to_fp16=half)
    except RuntimeError as cause:
        _raise_reason(path)
        raise BundleError(f"{path.name}: OpenVINO could not write it ({cause})") from cause
    if not _is_whole(path):
        _raise_reason(path)
        raise BundleError(f"{path.name}: could not be written to its end; is the disk full?")


def _number_afresh(model: ov.Model) -> None:
    """Count unnamed nodes within the model, as OpenVINO counts them within the process.

    The same conversion then gives the same file, byte for byte.
    """
    for i, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() == "Loop":
            _number_afresh(node.get_function())
        old = node.get_friendly_name()
        counted = COUNTED_NAME.fullmatch(old)
        if not counted:
            continue
        new = f"{counted[1]}_{i}{counted[2]}"
        node.set_friendly_name(new)
        for output in node.outputs():
            if old in output.get_names():
                output.set_names({new})


def _raise_reason(path: Path) -> None:
    """Write a little more, as the system names the reason where OpenVINO says `iostream error`."""
    for part in (path.with_suffix(".bin"), path):
        with part.open("ab") as file:
            file.write(bytes(PROBE_BYTES))


def _is_whole(path: Path) -> bool:
    """Whether the IR can be read to its end, and its weights are as long as it says they are."""
    try:
        data = ET.parse(path).getroot().iter("data")
    except ET.ParseError:
        return False
    ends = [int(d.get("offset", 0)) + int(d.get("size", 0)) for d in data if d.get("offset")]
    return path.with_suffix(".bin").stat().st_size >= max(ends, default=0)
