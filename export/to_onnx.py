"""Write a decoder as ONNX: `model.onnx` and `model.onnx.data`, and `genai_config.json` beside them.

Inputs: `input_ids` int64 `[B, T]` or `inputs_embeds` fp32 `[B, T, D]`, `attention_mask` int64 `[B,
S]` over everything so far, `position_ids` int64 `[B, T]` (with M-RoPE `[3, B, T]`) if a layer reads
positions, `spin_image_mask` int64 `[B, T]` if one asks where images lie, the states, and an
optional `logits_to_keep` (int64 scalar, default 1); with adapter slots, the pairs of
`onnx_side.py`.
Outputs: `logits` fp32 `[B, min(logits_to_keep, T), V]`, `last_logits` `[B, 1, V]`, with
`spin_scores` `image_mass` fp32 `[B, 1]`, and the states after, under the names of
`states.state_records`.
"""

from pathlib import Path
from typing import get_args

from edgekit.bundle import FRESH_STATES
from edgekit.errors import UsageError
from edgekit.export.onnx_contrib import ContribGraph
from edgekit.export.onnx_file import OnnxFile
from edgekit.export.onnx_genai import write_genai_config
from edgekit.export.onnx_linear import LinearWriter, WeightFormat
from edgekit.export.onnx_portable import PortableGraph
from edgekit.export.side_paths import NO_SIDE_PATHS, SidePaths
from edgekit.models.config import DecoderConfig
from edgekit.models.describe import describe_decoder
from edgekit.models.weights import WeightStore

__all__ = ["write_onnx"]

GRAPHS = {"contrib": ContribGraph, "portable": PortableGraph}


def write_onnx(
    config: DecoderConfig,
    weights: WeightStore,
    out: Path,
    *,
    weights_format: str = "fp32",
    ops: str = "contrib",
    side: SidePaths = NO_SIDE_PATHS,
) -> None:
    """Write `out/model.onnx`, `out/model.onnx.data` and, for token ids, `out/genai_config.json`.

    Args:
        config: the decoder.
        weights: its tensors, read one at a time.
        out: an existing directory.
        weights_format: fp32, fp16, int8 or int4. The last two quantise the linear layers by
            blocks, the token table and the head always to 8 bits. The gate, the convolution, the
            feature map and the norms stay fp32 in every format.
        ops: `contrib` for ONNX Runtime's own operators, `portable` for standard ones only.
        side: low-rank paths beside linear layers, fp32 in every format.

    Raises:
        UsageError: for a format, operator set that does not exist.
        SourceError: if `weights` lacks a tensor.
    """
    if ops not in GRAPHS:
        raise UsageError(f"ONNX operators {ops!r} given; allowed: {', '.join(GRAPHS)}")
    if weights_format not in get_args(WeightFormat):
        allowed = ", ".join(get_args(WeightFormat))
        raise UsageError(f"weights {weights_format!r} given; allowed: {allowed}")
    with OnnxFile(out) as file:
        contrib = ops == "contrib"
        writer = LinearWriter(file, weights, weights_format, contrib=contrib)
        graph = GRAPHS[ops](file, writer, config, side)
        describe_decoder(graph, config)
        if contrib and not graph.shares_states:
            file.metadata[FRESH_STATES] = "1"
    if config.reads == "tokens":
        write_genai_config(config, out, shared_cache=graph.shares_states)
