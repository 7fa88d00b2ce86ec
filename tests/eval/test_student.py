"""A student is measured as what it is: its teacher with other layers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgekit.errors import SourceError
from edgekit.eval.perplexity import perplexity
from edgekit.eval.reader import open_reader
from edgekit.eval.retrieval import RetrievalOptions, retrieval
from edgekit.eval.windows import WindowOptions
from edgekit.export.pipeline import convert
from edgekit.mixers.base import mixer_type
from edgekit.models.config import LawcatConfig
from edgekit.sources import open_source
from edgekit.sources.student import StudentManifest, write_student

TEXT = "The capital of France is Paris. Nobody knew. " * 20


@pytest.fixture(scope="module")
def student(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, but for random values in place of the convolutions."""
    source, work = open_source(checkpoint), tmp_path_factory.mktemp("student")
    config = source.config.with_mixers(("lawcat", "softmax", "lawcat"), LawcatConfig())
    tensors = {
        f"model.layers.{layer}.self_attn.{name}": tensor
        for layer in (0, 2)
        for name, tensor in mixer_type("lawcat").fresh_tensors(config, layer).items()
    }
    torch.manual_seed(5)
    tensors = {name: t + 0.1 * torch.randn_like(t) for name, t in tensors.items()}
    manifest = StudentManifest(name="tiny", base=source.identity, mixers=config.mixers)
    write_student(work, manifest, tensors, dtype="float32")
    return work


def test_perplexity_equals_that_of_its_bundle(
    student: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = WindowOptions(window=100)
    mine = open_reader(student, logits="all", base=checkpoint)
    found = perplexity(mine, TEXT, options)
    plain = perplexity(open_reader(checkpoint, logits="all"), TEXT, options)
    assert found.perplexity != pytest.approx(plain.perplexity, rel=1e-3)
    convert(checkpoint, tmp_path / "out", student=str(student), weights="fp32", verify=False)
    bundle = perplexity(open_reader(tmp_path / "out", logits="all"), TEXT, options)
    assert found.perplexity == pytest.approx(bundle.perplexity, rel=1e-4)


def test_retrieval_and_identity(student: Path, checkpoint: Path) -> None:
    reader = open_reader(student, logits="last", base=checkpoint)
    assert reader.identity["kind"] == "student"
    assert reader.identity["base"] == open_source(checkpoint).identity
    asked = RetrievalOptions(task="passkey", lengths=(500,), samples=(3,), max_new_tokens=4)
    assert retrieval(reader, asked).cells[0].samples == 3


def test_another_base_is_refused(student: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match="was made from"):
        open_reader(student, logits="last", base=tiny_checkpoint("llama", seed=9))
