from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import EngineError, SourceError, UsageError
from edgekit.eval.reader import open_reader
from edgekit.testing import TOLERANCE, assert_close

IDS = np.random.default_rng(3).integers(3, 320, (2, 1100))
ENGINES = [None, "openvino", "onnx"]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda name: name or "torch")
def test_blocks_and_steps_read_as_one_call(
    bundles: Callable[[str], Path], checkpoint: Path, engine: str | None
) -> None:
    spec = bundles("softmax") if engine else checkpoint
    every = open_reader(spec, logits="all", engine=engine).start(2).append(IDS)
    assert every.shape == (2, 1100, 320)
    last = open_reader(spec, logits="last", engine=engine).start(2)
    steps = [last.append(IDS[:, a:b]) for a, b in ((0, 1098), (1098, 1099), (1099, 1100))]
    expected = every[:, -3:].swapaxes(0, 1)
    assert_close("logits", expected, np.stack(steps), ratio=10 * TOLERANCE["float32"])


def test_padding_changes_nothing_in_torch(checkpoint: Path) -> None:
    reader = open_reader(checkpoint, logits="last")
    ids, mask = IDS.copy(), np.ones_like(IDS)
    ids[1, :600], mask[1, :600] = 0, 0
    both = reader.start(2)
    alone = reader.start(1)
    first = both.append(ids, mask)[1], alone.append(IDS[1:, 600:])[0]
    assert_close("prompt", first[1], first[0], ratio=TOLERANCE["float32"])
    step = np.array([[5], [6]])
    then = both.append(step)[1], alone.append(step[1:])[0]
    assert_close("step", then[1], then[0], ratio=TOLERANCE["float32"])


def test_limits_and_identities(bundles: Callable[[str], Path], checkpoint: Path) -> None:
    readers = [
        open_reader(spec, logits="last")
        for spec in (checkpoint, *map(bundles, ("softmax", "lawcat")))
    ]
    assert [reader.limit for reader in readers] == [4096, 4096, None]
    assert len({str(reader.identity) for reader in readers}) == 3
    assert [reader.stops for reader in readers] == [{2}] * 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"engine": "onnx"}, UsageError, "engine onnx given for .*; allowed: with a bundle only"),
        ({"base": "x"}, UsageError, "base x given for .*; allowed: with a student only"),
        ({"device": "tpu9"}, EngineError, "device tpu9 given; PyTorch cannot use it"),
        ({"device": "cuda:99"}, EngineError, "device cuda:99 given; PyTorch cannot use it"),
    ],
    ids=["engine", "base", "unknown-device", "absent-device"],
)
def test_refusals_of_a_source(
    checkpoint: Path, arguments: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_reader(checkpoint, logits="last", **arguments)


def test_refusals_of_others(bundles: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="base x given for"):
        open_reader(bundles("softmax"), logits="last", base="x")
    with pytest.raises(SourceError, match="no such source"):
        open_reader("nowhere-at-all", logits="last")
