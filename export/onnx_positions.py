"""The input `position_ids` of the ONNX graphs: one number per token, or three with M-RoPE."""

from onnx import TensorProto

from edgekit.export.onnx_file import OnnxFile
from edgekit.export.states import POSITIONS
from edgekit.models.config import RopeConfig
from edgekit.models.rope import frequency_axes

__all__ = ["declare_positions", "frequency_positions"]


def declare_positions(file: OnnxFile, rope: RopeConfig) -> None:
    """Add the input, `[B, T]`, or time, height and width `[3, B, T]`."""
    axes: list[int | str] = [] if rope.mrope_section is None else [3]
    file.input(POSITIONS, TensorProto.INT64, [*axes, "batch", "time"])


def frequency_positions(file: OnnxFile, rope: RopeConfig) -> str:
    """Positions, fp32 `[B, T, 1, 1]`; with M-RoPE those of each frequency, `[B, T, 1, d / 2]`."""
    number = file.node("Cast", [POSITIONS], "rope.cast", to=TensorProto.FLOAT)
    if rope.mrope_section is None:
        return file.node("Unsqueeze", [number, file.constant([2, 3])], "rope.steps")
    axes = file.constant(frequency_axes(rope.mrope_section))
    chosen = file.node("Gather", [number, axes], "rope.axes", axis=0)
    rows = file.node("Transpose", [chosen], "rope.rows", perm=[1, 2, 0])
    return file.node("Unsqueeze", [rows, file.constant([2])], "rope.steps")
