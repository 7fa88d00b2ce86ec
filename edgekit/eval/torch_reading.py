"""Reading in PyTorch: prompts in blocks, so that memory stays flat, then token by token."""

from collections.abc import Callable

import numpy as np
import torch

from edgekit.errors import EngineError
from edgekit.eval.reader import Floats, Integers, Logits
from edgekit.mixers.base import State
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder
from edgekit.models.weights import WeightStore

__all__ = ["TorchReading", "load_decoder", "start_reading"]

BLOCK = 512  # tokens of one call of the decoder


def load_decoder(
    config: DecoderConfig, weights: WeightStore, *, device: str | None, threads: int | None
) -> tuple[Decoder, str]:
    """The decoder in fp32 on its device, and that device's name.

    Args:
        config: the decoder's.
        weights: its tensors.
        device: such as `cpu` or `cuda:0`; None: `cuda` if it is there.
        threads: of PyTorch's operators on a CPU, in the whole process; None: as they are.

    Raises:
        EngineError: if PyTorch does not know the device, or cannot reach it.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        decoder = Decoder.from_store(config, weights).to(torch.device(name.lower()))
    except (RuntimeError, AssertionError) as cause:
        reason = str(cause).splitlines()[0]
        raise EngineError(f"device {name} given; PyTorch cannot use it ({reason})") from cause
    return decoder, name.lower()


def start_reading(decoder: Decoder, logits: Logits) -> Callable[[int], "TorchReading"]:
    """What makes readings of `decoder`, given their number of rows."""
    return lambda batch: TorchReading(decoder, batch, logits)


class TorchReading:
    """Rows of text in flight in a decoder."""

    def __init__(self, decoder: Decoder, batch: int, logits: Logits) -> None:
        """Start `batch` empty rows."""
        self._decoder, self._logits = decoder, logits
        self._device = decoder.lm_head.weight.device
        self._state: list[State] | None = None
        self._mask = torch.zeros((batch, 0), dtype=torch.int64, device=self._device)

    @torch.inference_mode()
    def append(self, ids: Integers, mask: Integers | None = None) -> Floats:
        """Read `ids [B, T]`; see `edgekit.eval.reader.Reading`."""
        valid = np.ones_like(ids) if mask is None else mask
        blocks: list[torch.Tensor] = []
        for begin in range(0, ids.shape[1], BLOCK):
            columns = slice(begin, begin + BLOCK)
            hidden = self._step(ids[:, columns], valid[:, columns])
            blocks = [*blocks, hidden] if self._logits == "all" else [hidden[:, -1]]
        read = torch.cat(blocks, dim=1) if self._logits == "all" else blocks[0]
        answer: Floats = self._decoder.lm_head(read).float().cpu().numpy()
        return answer

    def _step(self, ids: Integers, valid: Integers) -> torch.Tensor:
        """`[B, T, D]` of one block; the mask is given only where something is padded."""
        seen = torch.from_numpy(np.ascontiguousarray(valid)).to(self._device)
        self._mask = torch.cat((self._mask, seen), dim=1)
        tokens = torch.from_numpy(np.ascontiguousarray(ids)).to(self._device)
        mask = None if bool(self._mask.all()) else self._mask
        hidden, self._state = self._decoder.hidden(tokens, mask=mask, state=self._state)
        return hidden
