"""A decoder computes where its weights are: what is left on the CPU shows on the meta device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgekit.testing import scrambled_decoder


@pytest.mark.parametrize("mixer", ["softmax", "lawcat"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_every_tensor_is_on_the_device_of_the_ids(
    tiny_checkpoint: Callable[..., Path], mixer: str, masked: bool
) -> None:
    decoder = scrambled_decoder(tiny_checkpoint("llama"), (mixer,) * 3, "q_head")[2].to("meta")
    state = None
    for time, total in ((100, 100), (1, 101)):
        ids = torch.zeros((2, time), dtype=torch.int64, device="meta")
        mask = torch.ones((2, total), dtype=torch.int64, device="meta") if masked else None
        logits, state = decoder(ids, mask=mask, state=state)
        assert logits.device.type == "meta"
