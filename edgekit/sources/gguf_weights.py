"""The tensors of a GGUF file, dequantised piece by piece into one fp32 safetensors file."""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgekit.errors import SourceError, UnsupportedError
from edgekit.sources.gguf_config import ROPE_FREQS, Metadata

__all__ = ["write_json", "write_weights"]

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PIECE = 1 << 22  # values dequantised at a time: 16 MiB of fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor to write; `interleaved_heads` is set where llama.cpp has reordered the rows."""

    name: str
    tensor: Any
    interleaved_heads: int | None

    @property
    def shape(self) -> list[int]:
        """Rows first, as PyTorch has it; GGUF stores it the other way round."""
        return [int(size) for size in reversed(self.tensor.shape)]


def write_weights(metadata: Metadata, path: Path) -> None:
    """Write every tensor of the file to `path`, under the names of a Hugging Face Llama.

    Raises:
        SourceError: if a tensor does not decode to the size that its header gives.
        UnsupportedError: if a tensor has no place in the decoder, or a type that cannot be decoded.
    """
    entries = [
        _entry(metadata, name, tensor)
        for name, tensor in metadata.tensors.items()
        if name != ROPE_FREQS
    ]
    with path.open("wb") as file:
        _write_header(file, entries)
        for entry in entries:
            _write_tensor(file, entry)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _entry(metadata: Metadata, name: str, tensor: Any) -> Entry:
    stem, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    part = match[2] if match else stem
    target = (LAYER_NAMES if match else GLOBAL_NAMES).get(part)
    if target is None or leaf not in ("weight", "bias"):
        raise UnsupportedError(
            f"GGUF tensor {name!r} has no place in a {metadata.architecture} decoder"
        )
    prefix = f"model.layers.{match[1]}." if match else ""
    heads = dict(zip(("attn_q", "attn_k"), metadata.heads, strict=True)).get(part)
    interleaved = heads if metadata.architecture == "llama" else None
    return Entry(name=f"{prefix}{target}.{leaf}", tensor=tensor, interleaved_heads=interleaved)


def _write_header(file: BinaryIO, entries: list[Entry]) -> None:
    """The safetensors header: its length, then JSON padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + 4 * int(np.prod(entry.shape))
        header[entry.name] = {"dtype": "F32", "shape": entry.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _write_tensor(file: BinaryIO, entry: Entry) -> None:
    written = 0
    for piece in _pieces(entry):
        file.write(piece.astype("<f4", copy=False).tobytes())
        written += piece.size
    if written != int(np.prod(entry.shape)):
        raise SourceError(f"GGUF tensor {entry.tensor.name!r} is damaged; fetch the file again")


def _pieces(entry: Entry) -> Iterator[npt.NDArray[np.float32]]:
    from gguf import dequantize

    rows = np.asarray(entry.tensor.data)
    if entry.interleaved_heads:
        rows = _half_split(rows, entry.interleaved_heads)
    step = len(rows) if rows.ndim == 1 else max(1, PIECE // entry.shape[-1])
    try:
        for start in range(0, len(rows), step):
            piece = np.ascontiguousarray(rows[start : start + step])
            yield dequantize(piece, entry.tensor.tensor_type)
    except NotImplementedError as cause:
        raise UnsupportedError(
            f"GGUF tensor {entry.tensor.name!r} is of type {entry.tensor.tensor_type.name}, not "
            "decoded by the gguf package; supported: F32, F16, BF16, Q4_0 to Q8_0, K- and I-quants"
        ) from cause


def _half_split(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Put rotary pairs back from neighbours to half a head apart; rows stay quantised."""
    half = len(rows) // heads // 2
    pairs = rows.reshape(heads, half, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
