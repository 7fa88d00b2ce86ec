from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from edgekit.errors import UsageError
from edgekit.eval.perplexity import Options, bundle_perplexity, source_perplexity
from edgekit.export.pipeline import convert
from edgekit.models.decoder import Decoder
from edgekit.sources import open_source

TEXT = "The capital of France is Paris. Once upon a time, 12 small models ran. Été à Paris! " * 12


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module", params=["softmax", "lawcat"])
def mixer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, mixer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / mixer
    convert(checkpoint, out, mixer=mixer, weights="fp32", verify=False)
    return out


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
    result = source_perplexity(checkpoint, TEXT, Options(window=window))
    assert result.engine == "torch"
    assert (result.tokens, result.predictions) == (tokens, predictions)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_bundle_equals_source(bundle: Path, mixer: str, checkpoint: Path, engine: str) -> None:
    options = Options(window=300, max_tokens=700)
    got = bundle_perplexity(bundle, TEXT, options, engine=engine)
    assert got.engine == engine
    assert got.windows == 3
    if mixer == "softmax":
        reference = source_perplexity(checkpoint, TEXT, options)
        assert got.perplexity == pytest.approx(reference.perplexity, rel=1e-4)
        assert got.bits_per_byte == pytest.approx(reference.bits_per_byte, rel=1e-4)


def test_stride_predicts_every_token_once(checkpoint: Path) -> None:
    result = source_perplexity(checkpoint, TEXT, Options(window=100, stride=40, max_tokens=505))
    assert result.predictions == result.tokens - 1 == 504
    assert result.windows == 12


def test_bits_per_byte_counts_utf8(checkpoint: Path) -> None:
    result = source_perplexity(checkpoint, "Été", Options())
    assert result.bytes == len("Été".encode()) == 5
    assert result.interval is None


def test_interval_holds_the_perplexity(checkpoint: Path) -> None:
    result = source_perplexity(checkpoint, TEXT, Options(window=100))
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
        Options(**settings)


def test_refusals(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="window 600 given; this model's context is 512"):
        source_perplexity(checkpoint, TEXT, Options(window=600))
    with pytest.raises(UsageError, match="the text has 0 tokens"):
        source_perplexity(checkpoint, "", Options())
