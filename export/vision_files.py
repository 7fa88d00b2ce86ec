"""What a vision-language bundle has beside its decoder: the token table and the side of pictures.

OpenVINO's files are those of OpenVINO GenAI and Optimum: `openvino_text_embeddings_model` (`input`
to `inputs_embeds`) and `openvino_vision_embeddings_model` (`pixel_values` to `last_hidden_state`).
ONNX's are `embedding.onnx` and `vision.onnx` with the same outputs. Under SPIN, OpenVINO's
embeddings carry one more channel, 1 on pictures, for runtimes that know no other way to say where
pictures lie.
"""

import json
from pathlib import Path

import numpy as np
import openvino as ov
from onnx import TensorProto
from openvino import opset15 as op

from edgekit.export.onnx_file import OnnxFile
from edgekit.export.onnx_linear import LinearWriter
from edgekit.export.onnx_rounding import narrow_weights
from edgekit.export.onnx_table import TokenTable
from edgekit.export.openvino_file import compress_to_int8, save_ir
from edgekit.export.openvino_values import ints, parameter, scalar
from edgekit.export.openvino_weights import WeightConstants
from edgekit.export.states import EMBEDDINGS
from edgekit.export.vision import VisionSide, vision_to_onnx, vision_to_openvino
from edgekit.export.vision_qwen import EMBEDDER, PatchSide, patches_to_onnx, patches_to_openvino
from edgekit.models.config import DecoderConfig
from edgekit.models.weights import WeightStore
from edgekit.sources import Source
from edgekit.sources.picture_model import whole_model
from edgekit.sources.vlm import PATCHED

__all__ = ["Side", "open_vision", "write_onnx_vision", "write_openvino_vision", "write_processor"]

TABLE, TEXT_FILE = "model.embed_tokens", "openvino_text_embeddings_model"
ROUNDED = ("int8", "int4")
PROCESSOR = "preprocessor_config.json"


Side = VisionSide | PatchSide


def open_vision(source: Source) -> Side:
    """The vision side of a source, without the layers of its decoder.

    Raises:
        SourceError: if a tensor of the vision side is missing or has another shape.
        UnsupportedError: for a family whose vision side is not known.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.directory, local_files_only=True)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    model = whole_model(source, config)
    return PatchSide(model) if config.model_type in PATCHED else VisionSide(model)


def write_processor(source: Source, out: Path) -> None:
    """Write `preprocessor_config.json`."""
    assert source.vision is not None
    text = json.dumps(source.vision.processor, indent=2, ensure_ascii=False)
    (out / PROCESSOR).write_text(text + "\n", encoding="utf-8")


def write_openvino_vision(
    side: Side, config: DecoderConfig, weights: WeightStore, out: Path, *, weights_format: str
) -> None:
    """Write both of OpenVINO's files.

    Args:
        side: tower and projector.
        config: the decoder's; its `image_flag` adds a channel.
        weights: the decoder's, for the token table.
        out: an existing directory.
        weights_format: as for the decoder; int4 leaves 8 bits here.

    Raises:
        OSError: if the disk is full.
        BundleError: if OpenVINO cannot write them for another reason.
    """
    half = weights_format == "fp16"
    table = _text_table(config, weights, half=half)
    graphs = _pictures(side)
    if config.image_flag:
        _add_channel(table, 0.0)
        _add_channel(list(graphs.values())[-1], 1.0)
    for name, model in {TEXT_FILE: table, **graphs}.items():
        if weights_format in ROUNDED:
            compress_to_int8(model)
        save_ir(model, out / f"{name}.xml", half=half)


def _pictures(side: Side) -> dict[str, ov.Model]:
    """The graphs of pictures by file, in the order that they run in."""
    if isinstance(side, PatchSide):
        return patches_to_openvino(side)
    return {EMBEDDER: vision_to_openvino(side)}


def _text_table(config: DecoderConfig, weights: WeightStore, *, half: bool) -> ov.Model:
    constants = WeightConstants(weights, half=half)
    ids = parameter("input", [-1, -1], ov.Type.i64)
    rows = op.gather(constants.matrix(f"{TABLE}.weight"), ids, ints(0))
    rows.set_friendly_name(TABLE)
    if config.embedding_scale != 1:
        rows = op.multiply(rows, scalar(config.embedding_scale))
    result = op.result(rows)
    result.get_output_tensor(0).set_names({EMBEDDINGS})
    model = ov.Model([result], [ids], f"{config.family}_text_embeddings")
    model.edgekit_owners = constants.owners
    return model


def _add_channel(model: ov.Model, value: float) -> None:
    """One more channel of the only output, of the same value everywhere."""
    result = model.get_results()[0]
    given, names = result.input_value(0), result.get_output_tensor(0).get_names()
    one = op.slice(given, ints([0]), ints([1]), ints([1]), ints([-1]))
    channel = op.add(op.multiply(one, scalar(0.0)), scalar(value))
    result.input(0).replace_source_output(op.concat([given, channel], -1).output(0))
    model.validate_nodes_and_infer_types()
    result.get_output_tensor(0).set_names(names)


def write_onnx_vision(
    side: Side,
    config: DecoderConfig,
    weights: WeightStore,
    out: Path,
    *,
    weights_format: str,
    contrib: bool,
) -> None:
    """Write `embedding.onnx` and `vision.onnx`; see `write_openvino_vision`."""
    with OnnxFile(out, "embedding.onnx") as file:
        writer = LinearWriter(file, weights, weights_format, contrib=contrib)
        ids = file.input("input_ids", TensorProto.INT64, ["batch", "time"])
        rows = TokenTable(file, writer).embed(TABLE, ids)
        if config.embedding_scale != 1:
            scale = file.constant(np.float32(config.embedding_scale))
            rows = file.node("Mul", [rows, scale], f"{TABLE}.scaled")
        shape: list[int | str] = ["batch", "time", config.hidden_size]
        file.output(EMBEDDINGS, TensorProto.FLOAT, shape)
        file.rename_output(rows, EMBEDDINGS)
    to_onnx = patches_to_onnx if isinstance(side, PatchSide) else vision_to_onnx
    to_onnx(side, out / "vision.onnx")  # type: ignore[arg-type]
    if weights_format != "fp32":
        narrow_weights(out / "vision.onnx", weights_format)
