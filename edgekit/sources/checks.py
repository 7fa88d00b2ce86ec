"""Whether a checkpoint holds what its configuration promises, before any work is spent on it."""

import torch

from edgekit.errors import SourceError, UnsupportedError
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder
from edgekit.models.weights import WeightStore

__all__ = ["check_weights"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old checkpoints carry and that the configuration says better.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)


def check_weights(config: DecoderConfig, weights: WeightStore) -> None:
    """Check presence, shape and dtype of every tensor, and that none is left over that matters.

    Args:
        config: says which tensors there must be.
        weights: memory-mapped; only headers are read, but for a tied head that is stored too.

    Raises:
        SourceError: naming the first tensor that is missing or has another shape.
        UnsupportedError: for integer or fp8 tensors, or a tensor that the decoder has no place for.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    if config.tied_head:
        del shapes[HEAD]
    for name, shape in shapes.items():
        _check_tensor(name, shape, weights)
    for name in weights:
        if name not in shapes and not name.endswith(HARMLESS_SUFFIXES):
            _check_left_over(name, weights)


def _check_tensor(name: str, shape: tuple[int, ...], weights: WeightStore) -> None:
    if name not in weights:
        raise SourceError(f"the checkpoint has no tensor {name!r}, which its config.json asks for")
    tensor = weights.tensor(name)
    if tuple(tensor.shape) != shape:
        raise SourceError(
            f"tensor {name!r} is {list(tensor.shape)}, config.json asks for {list(shape)}"
        )
    if tensor.dtype not in FLOATS:
        raise UnsupportedError(
            f"tensor {name!r} is {str(tensor.dtype).removeprefix('torch.')}; "
            "supported: float32, float16, bfloat16"
        )


def _check_left_over(name: str, weights: WeightStore) -> None:
    if name != HEAD:
        raise UnsupportedError(
            f"tensor {name!r} has no place in this decoder and would be ignored; "
            "supported: the plain family without additions"
        )
    if not torch.equal(weights.tensor(HEAD), weights.tensor(EMBEDDING)):
        raise UnsupportedError(
            f"tie_word_embeddings is true, but {HEAD!r} differs from {EMBEDDING!r}; "
            "set tie_word_embeddings to false in config.json"
        )
