from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from edgekit.errors import UsageError
from edgekit.eval.perplexity import Perplexity, perplexity
from edgekit.eval.reader import open_reader
from edgekit.eval.windows import WindowOptions
from edgekit.models.decoder import Decoder
from edgekit.sources import open_source

TEXT = "The capital of France is Paris. Once upon a time, 12 small models ran. Été à Paris! " * 12


def measured(spec: Path, text: str, options: WindowOptions, **engine: str) -> Perplexity:
    return perplexity(open_reader(spec, logits="all", **engine), text, options)


def plain_perplexity(checkpoint: Path, text: str, window: int) -> tuple[float, int, int]:
    """The protocol in a few lines of torch: perplexity, tokens and predictions."""
    from tokenizers import Tokenizer

    source = open_source(checkpoint)
    decoder = Decoder.from_store(source.config, source.weights)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    parts = [part for part in ids.split(window) if len(part) > 1]
    with torch.inference_mode():
        losses = [
            functional.cross_entropy(decoder(part[None])[0][0, :-1], part[1:], reduction="sum")
            for part in parts
        ]
    predictions = sum(len(part) - 1 for part in parts)
    mean = torch.stack(losses).sum() / predictions
    return mean.exp().item(), len(ids), predictions


@pytest.mark.parametrize("window", [2, 63, 300], ids=lambda window: f"window{window}")
def test_source_equals_plain_torch(checkpoint: Path, window: int) -> None:
    expected, tokens, predictions = plain_perplexity(checkpoint, TEXT, window)
    result = measured(checkpoint, TEXT, WindowOptions(window=window))
    assert result.engine == "torch"
    assert (result.tokens, result.predictions) == (tokens, predictions)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
@pytest.mark.parametrize("mixer", ["softmax", "lawcat"])
def test_bundle_equals_source(
    bundles: Callable[[str], Path], mixer: str, checkpoint: Path, engine: str
) -> None:
    options = WindowOptions(window=300, max_tokens=700)
    got = measured(bundles(mixer), TEXT, options, engine=engine)
    assert got.engine == engine
    assert got.windows == 3
    if mixer == "softmax":
        reference = measured(checkpoint, TEXT, options)
        assert got.perplexity == pytest.approx(reference.perplexity, rel=1e-4)
        assert got.bits_per_byte == pytest.approx(reference.bits_per_byte, rel=1e-4)


def test_stride_predicts_every_token_once(checkpoint: Path) -> None:
    result = measured(checkpoint, TEXT, WindowOptions(window=100, stride=40, max_tokens=505))
    assert result.predictions == result.tokens - 1 == 504
    assert result.windows == 12


def test_bits_per_byte_counts_utf8(checkpoint: Path) -> None:
    result = measured(checkpoint, "Été", WindowOptions())
    assert result.bytes == len("Été".encode()) == 5
    assert result.interval is None


def test_interval_holds_the_perplexity(checkpoint: Path) -> None:
    result = measured(checkpoint, TEXT, WindowOptions(window=100))
    assert result.interval is not None
    low, high = result.interval
    assert low < result.perplexity < high


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "window 1 given; allowed: 2 or more"),
        ({"window": 8, "stride": 9}, "stride 9 given; allowed: 1 to 8"),
        ({"max_tokens": 1}, "max-tokens 1 given"),
    ],
    ids=["window", "stride", "max-tokens"],
)
def test_options_out_of_range(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WindowOptions(**settings)


def test_refusals(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="window 5000 given; this model's context is 4096"):
        measured(checkpoint, TEXT * 10, WindowOptions(window=5000))
    with pytest.raises(UsageError, match="the text has 0 tokens"):
        measured(checkpoint, "", WindowOptions())
