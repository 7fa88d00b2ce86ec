"""What a step must read, counted in real graphs, and how fast memory is read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle import read_manifest
from edgekit.errors import EngineError, UsageError
from edgekit.export.pipeline import convert
from edgekit.peers.floor import floors, largest_cache, measure_bandwidth
from edgekit.peers.traffic import weight_bytes
from edgekit.runtime.state import state_bytes

ENGINES = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
Bundle = Callable[..., Path]


@pytest.fixture(scope="module")
def bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """`bundle(tied=False, mixer="lawcat", weights="int8")`, made once."""
    made: dict[str, Path] = {}

    def make(*, tied: bool = True, **settings: str) -> Path:
        key = f"{tied} {settings}"
        if key not in made:
            out = tmp_path_factory.mktemp("bundles") / "out"
            source = tiny_checkpoint("llama", tie_word_embeddings=tied)
            options = {"weights": "fp32", **settings}
            convert(source, out, verify=False, target="generic-x86", **options)
            made[key] = out
        return made[key]

    return make


def parameters(directory: Path, *without: str) -> int:
    """How many numbers a checkpoint has."""
    from safetensors.numpy import load_file

    tensors = load_file(directory / "model.safetensors")
    return sum(array.size for name, array in tensors.items() if name not in without)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_table_that_is_only_looked_up_does_not_count(
    tied: bool, engine: str, bundle: Bundle, tiny_checkpoint: Callable[..., Path]
) -> None:
    """A tied one is the head's weight, which every step reads."""
    source = tiny_checkpoint("llama", tie_word_embeddings=tied)
    table = () if tied else ("model.embed_tokens.weight",)
    expected = 4 * parameters(source, *table)
    found = weight_bytes(bundle(tied=tied) / ENGINES[engine])
    assert expected <= found < 1.05 * expected


@pytest.mark.parametrize("engine", ENGINES)
def test_compressed_weights_count_as_they_are_stored(engine: str, bundle: Bundle) -> None:
    wide = weight_bytes(bundle(tied=False) / ENGINES[engine])
    narrow = weight_bytes(bundle(tied=False, weights="int8") / ENGINES[engine])
    assert wide / 4 < narrow < wide / 2.5


@pytest.mark.parametrize("engine", ENGINES)
def test_state_of_softmax_grows_and_that_of_lawcat_does_not(engine: str, bundle: Bundle) -> None:
    softmax, lawcat = read_manifest(bundle()), read_manifest(bundle(mixer="lawcat"))
    assert state_bytes(softmax, engine, 200) == 2 * state_bytes(softmax, engine, 100) > 0
    assert state_bytes(lawcat, engine, 200) == state_bytes(lawcat, engine, 0) > 0


def test_state_is_what_the_session_says(bundle: Bundle) -> None:
    from edgekit.runtime import load

    session = load(bundle(), engine="openvino").session()
    session.append(np.arange(3, 20))
    assert state_bytes(read_manifest(bundle()), "openvino", 17) == session.state_bytes


def test_floor_is_bytes_over_the_highest_rate(bundle: Bundle) -> None:
    bandwidth = measure_bandwidth(1, repeat=2)
    first, last = floors(bundle(), "openvino", (300, 0), bandwidth)
    assert (first.depth, last.depth) == (0, 300)
    for row in (first, last):
        seconds = (row.weight_bytes + row.state_bytes) / bandwidth.bytes_per_second.high
        assert row.ms_per_token == pytest.approx(1e3 * seconds)
        assert row.tokens_per_second == pytest.approx(1 / seconds)
    assert last.ms_per_token > first.ms_per_token


def test_the_buffer_is_larger_than_every_cache() -> None:
    found = measure_bandwidth(2, repeat=1)
    assert found.threads == 2
    assert found.buffer_bytes >= max(256 * 2**20, 8 * (found.cache_bytes or 0))
    assert len(found.bytes_per_second.samples) == 1
    assert found.bytes_per_second.high > 1e8


def test_largest_cache(tmp_path: Path) -> None:
    for index, text in enumerate(("48K", "2048K", "33M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text + "\n", encoding="ascii")
    assert largest_cache(tmp_path) == 33 * 2**20
    assert largest_cache(tmp_path / "nowhere") is None


def test_engine_that_the_bundle_is_not_for(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(tiny_checkpoint("llama"), out, verify=False, formats=("openvino",))
    with pytest.raises(EngineError, match="'onnx' given; this bundle is for openvino"):
        floors(out, "onnx", (0,), measure_bandwidth(1, repeat=1))


@pytest.mark.parametrize(("threads", "repeat"), [(0, 1), (1, 0)])
def test_counts_below_one(threads: int, repeat: int) -> None:
    with pytest.raises(UsageError, match="0 given; allowed: 1 or more"):
        measure_bandwidth(threads, repeat)
