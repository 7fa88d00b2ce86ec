from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from edgekit.errors import UsageError
from edgekit.eval.agreement import agreement
from edgekit.eval.reader import Reader, open_reader
from edgekit.eval.torch_reading import start_reading
from edgekit.eval.windows import WindowOptions
from edgekit.models.decoder import Decoder
from edgekit.sources import open_source
from edgekit.testing import scrambled_decoder

TEXT = "The capital of France is Paris. Once upon a time, 12 small models ran. " * 12
# The teacher is rarely right about the first half; both are about the second.
MIXED = "".join(chr(33 + 7 * i * i % 90) for i in range(1200)) + " i" * 150
OPTIONS = WindowOptions(window=100, max_tokens=430)


@pytest.fixture(scope="module")
def teacher(checkpoint: Path) -> Reader:
    return open_reader(checkpoint, logits="all")


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> Decoder:
    """A model that says something else: random recurrent layers."""
    torch.manual_seed(1)
    return scrambled_decoder(checkpoint, ("lawcat", "softmax", "lawcat"), "q_head")[2]


@pytest.fixture(scope="module")
def student(teacher: Reader, decoder: Decoder) -> Reader:
    return replace(teacher, name="student", start=start_reading(decoder, "all"))


def test_equals_plain_torch(
    teacher: Reader, student: Reader, decoder: Decoder, checkpoint: Path
) -> None:
    source = open_source(checkpoint)
    own = Decoder.from_store(source.config, source.weights)
    ids = torch.from_numpy(teacher.tokenizer.encode(MIXED))
    kl, same, flips, right, count = 0.0, 0, 0, 0, 0
    for part in ids.split(100):
        with torch.inference_mode():
            ours, theirs = decoder(part[None])[0][0, :-1], own(part[None])[0][0, :-1]
        pair = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl += functional.kl_div(*pair, reduction="sum", log_target=True).item()
        agreed, correct = ours.argmax(-1) == theirs.argmax(-1), theirs.argmax(-1) == part[1:]
        same, flips = same + int(agreed.sum()), flips + int((correct & ~agreed).sum())
        right, count = right + int(correct.sum()), count + len(part) - 1
    result = agreement(student, teacher, MIXED, WindowOptions(window=100))
    assert (result.windows, result.predictions) == (-(-len(ids) // 100), count)
    assert result.kl.value == pytest.approx(kl / count, rel=1e-4)
    assert result.top1.value == pytest.approx(same / count)
    assert result.flips.value == pytest.approx(flips / count)
    assert result.teacher_accuracy == pytest.approx(right / count)
    assert 0 < flips < right < count


def test_intervals_hold_their_values(teacher: Reader, student: Reader) -> None:
    result = agreement(student, teacher, TEXT, OPTIONS)
    for estimate in (result.kl, result.top1, result.flips):
        assert estimate.interval is not None
        low, high = estimate.interval
        assert 0 <= low <= estimate.value <= high
    short = agreement(student, teacher, TEXT, replace(OPTIONS, max_tokens=150))
    assert short.kl.interval is None


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_a_bundle_agrees_with_its_source(
    bundles: Callable[[str], Path], teacher: Reader, engine: str
) -> None:
    bundle = open_reader(bundles("softmax"), logits="all", engine=engine)
    result = agreement(bundle, teacher, TEXT, OPTIONS)
    assert result.engine == engine
    assert abs(result.kl.value) < 1e-6
    assert (result.top1.value, result.flips.value) == (1.0, 0.0)


def test_overlapping_windows_count_every_position_once(teacher: Reader, student: Reader) -> None:
    options = WindowOptions(window=100, stride=40, max_tokens=431)
    assert agreement(student, teacher, TEXT, options).predictions == 430


def test_another_vocabulary_is_refused(
    teacher: Reader, tiny_checkpoint: Callable[..., Path]
) -> None:
    wider = open_reader(tiny_checkpoint("llama", vocab_size=328), logits="all")
    with pytest.raises(UsageError, match="has 328 tokens in its vocabulary"):
        agreement(wider, teacher, TEXT, OPTIONS)


def test_other_tokens_are_refused(teacher: Reader, student: Reader, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from edgekit.runtime import text

    words = Tokenizer(models.WordLevel({"The": 0, "capital": 1}, unk_token="The"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    other = replace(student, tokenizer=text.Tokenizer(tmp_path))
    with pytest.raises(UsageError, match="cut the text into different tokens"):
        agreement(other, teacher, TEXT, OPTIONS)
