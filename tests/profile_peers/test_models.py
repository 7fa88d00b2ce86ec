"""The model of a peer that was not named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.errors import UsageError
from edgekit.export.pipeline import convert
from edgekit.peers import default_model


@pytest.fixture(scope="module")
def bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    def make(mixer: str) -> Path:
        out = tmp_path_factory.mktemp("bundles") / mixer
        convert(tiny_checkpoint("llama"), out, verify=False, weights="fp32", mixer=mixer)
        return out

    return make


@pytest.mark.parametrize("name", ["openvino-genai", "ort-genai"])
def test_a_softmax_bundle_is_its_own(name: str, bundle: Callable[[str], Path]) -> None:
    softmax = bundle("softmax")
    assert default_model(name, softmax) == softmax
    with pytest.raises(UsageError, match=f"peer {name}: .* name the model of the peer: a dir"):
        default_model(name, bundle("lawcat"))


def test_llama_cpp_reads_what_the_bundle_was_made_from(bundle: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"not from a built-in model; name .*a \.gguf file"):
        default_model("llama-cpp", bundle("softmax"))
