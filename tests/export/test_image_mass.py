"""How far heads look at images, as both engines say it, against the torch decoder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.bundle import FORMAT_VERSION, IMAGE_MASS, Manifest, ModelFacts
from edgekit.errors import UnsupportedError, UsageError
from edgekit.export.openvino_file import write_openvino
from edgekit.export.states import input_names, state_records
from edgekit.export.to_onnx import write_onnx
from edgekit.export.to_openvino import build_openvino
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder, image_mass
from edgekit.models.spin import SpinConfig
from edgekit.models.weights import MemoryStore, OverlayStore, WeightStore
from edgekit.runtime.engine import Engine, EngineSettings
from edgekit.runtime.ort import OnnxEngine
from edgekit.runtime.ov import OpenVinoEngine
from edgekit.testing import scrambled_decoder

SPIN = SpinConfig(suppress=2, alpha=0.25)
WATCHED = SpinConfig(suppress=0)
LAYOUTS = {
    "softmax": (("softmax",) * 3, "q_head"),
    "lawcat-q": (("lawcat",) * 3, "q_head"),
    "lawcat-kv": (("lawcat",) * 3, "kv_head"),
    "hybrid": (("softmax", "lawcat", "softmax"), "kv_head"),
}
SETTINGS = EngineSettings(device="CPU", logits="last", threads=1, cache_dir=None, precision="f32")
BLOCKS = (1, 7, 64, 65, 1, 1, 30, 1)
MAX_ABS = 1e-4
Tiny = Callable[..., Path]
Open = Callable[[DecoderConfig, WeightStore], Engine]


def model_of(
    checkpoint: Path, layout: str, spin: SpinConfig = SPIN
) -> tuple[DecoderConfig, WeightStore, Decoder]:
    """A decoder whose heads look at very different things, and whose graphs say so."""
    config, weights, _ = scrambled_decoder(checkpoint, *LAYOUTS[layout])
    sharp = {n: 5 * weights.tensor(n) for n in weights if n.endswith("q_proj.weight")}
    weights = OverlayStore(MemoryStore(sharp), weights)
    config = replace(config, spin=spin, spin_scores=True)
    return config, weights, Decoder.from_store(config, weights)


@pytest.fixture(params=["openvino", "contrib", "portable"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """`opened(config, weights)`: the engine on a new graph."""
    ops = str(request.param)

    def make(config: DecoderConfig, weights: WeightStore) -> Engine:
        manifest = _manifest(config, ops)
        if ops == "openvino":
            write_openvino(config, weights, tmp_path, weights_format="fp32")
            return OpenVinoEngine(tmp_path, manifest, SETTINGS)
        write_onnx(config, weights, tmp_path, ops=ops)
        return OnnxEngine(tmp_path, manifest, SETTINGS)

    return make


def _manifest(config: DecoderConfig, ops: str) -> Manifest:
    facts = ModelFacts(
        family=config.family,
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        context_length=config.context_limit,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
        inputs=input_names(config),
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        source={},
        model=facts,
        mixers=config.mixers,
        states=state_records(config),
        weights="fp32",
        engines=("openvino", "onnx"),
        target="generic-x86",
        pipeline=({"step": "onnx", "ops": ops},),
        versions={},
        files={},
    )


class Reader:
    """Reads two rows: images early and late, and the second one padded if asked."""

    def __init__(self, engine: Engine, config: DecoderConfig, *, padding: int = 0) -> None:
        self.ids = torch.randint(0, config.vocab_size, (2, sum(BLOCKS)))
        self.image = torch.zeros(self.ids.shape, dtype=torch.bool)
        self.image[0, 3:20] = self.image[0, 60:90] = True
        self.image[1, 100:120] = True
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :padding] = 0
        self._inputs, self.request = engine.inputs, engine.request(2)

    def read(self, start: int, end: int, rows: tuple[int, ...] = (0, 1)) -> np.ndarray:
        """Logits `[B, V]` after these columns."""
        order, part = list(rows), slice(start, end)
        mask = self.mask[order, :end]
        feeds = {
            "input_ids": self.ids[order, part],
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)[:, part],
            "spin_image_mask": self.image[order, part].long(),
        }
        read = {n: x.contiguous().numpy() for n, x in feeds.items() if n in self._inputs}
        return self.request.infer(read)[:, -1]

    @property
    def mass(self) -> np.ndarray:
        """What the last call said, `[B]`."""
        found = self.request.image_mass
        assert found is not None
        assert (found.dtype, found.shape[1:]) == (np.float32, (1,))
        return found[:, 0]


@torch.inference_mode()
def torch_says(
    decoder: Decoder, reader: Reader, end: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[B, T, V]` and image mass `[B, T]` of all positions before `end`."""
    masses: list[torch.Tensor] = []
    ids, image, mask = (x[:, :end] for x in (reader.ids, reader.image, reader.mask))
    logits, _ = decoder(ids, image=image, mask=mask, form="parallel", masses=masses)
    return logits.numpy(), image_mass(masses).numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "padding"), [("llama", 0), ("llama", 6), ("gemma3_text", 6)])
def test_every_call_says_what_torch_says(
    family: str, layout: str, padding: int, opened: Open, tiny_checkpoint: Tiny
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint(family), layout)
    reader, end = Reader(opened(config, weights), config, padding=padding), 0
    cuts = (8, *BLOCKS[2:]) if padding else BLOCKS  # padding comes in the first call
    logits, masses = torch_says(decoder, reader)
    assert masses[0, 20:].min() > 0
    assert masses[0].max() > 0.2
    for size in cuts:
        found = reader.read(end, end + size)
        end += size
        assert np.abs(reader.mass - masses[:, end - 1]).max() <= MAX_ABS, (size, end)
        assert np.abs(found - logits[:, end - 1]).max() <= MAX_ABS, (size, end)
        if end <= 100:
            assert reader.mass[1] == 0
            assert masses[1, end - 1] == 0


@pytest.mark.parametrize("layout", ["softmax", "hybrid"])
def test_rows_that_move(layout: str, opened: Open, tiny_checkpoint: Tiny) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), layout)
    reader = Reader(opened(config, weights), config)
    assert reader.request.image_mass is None
    reader.read(0, 120)
    reader.request.reorder(np.array([1, 0, 1]))
    reader.read(120, 121, (1, 0, 1))
    expected = torch_says(decoder, reader)[1][[1, 0, 1], 120]
    assert np.abs(reader.mass - expected).max() <= MAX_ABS


def test_only_gated_layers_count(opened: Open, tiny_checkpoint: Tiny) -> None:
    spin = replace(SPIN, layers=(1, 2))
    config, weights, decoder = model_of(tiny_checkpoint("llama"), "hybrid", spin)
    reader = Reader(opened(config, weights), config)
    reader.read(0, 50)
    masses: list[torch.Tensor] = []
    with torch.inference_mode():
        decoder(reader.ids[:, :50], image=reader.image[:, :50], masses=masses)
    assert [tuple(mass.shape) for mass in masses] == [(2, 50, config.num_heads)]
    assert np.abs(reader.mass - masses[0][:, -1].mean(dim=1).numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("nothing", [WATCHED, SpinConfig(suppress=2, alpha=1.0)], ids=str)
@pytest.mark.parametrize("layout", ["softmax", "hybrid"])
def test_watching_changes_no_logits(
    nothing: SpinConfig,
    layout: str,
    opened: Open,
    tiny_checkpoint: Tiny,
    request: pytest.FixtureRequest,
) -> None:
    """Bit for bit, but with the fused operator of ONNX, which rotates by itself in plain layers."""
    config, weights, decoder = model_of(tiny_checkpoint("llama"), layout, nothing)
    plain = replace(config, spin=None, spin_scores=False)
    reader = Reader(opened(config, weights), config)
    watched = [reader.read(0, 110), reader.read(110, 111)]
    logits, masses = torch_says(decoder, reader, 111)
    assert masses[:, -1].min() > 0
    assert np.abs(reader.mass - masses[:, -1]).max() <= MAX_ABS
    with torch.inference_mode():
        alone = Decoder.from_store(plain, weights)(reader.ids[:, :111], form="parallel")[0]
    assert np.abs(logits - alone.numpy()).max() <= MAX_ABS
    other = Reader(opened(plain, weights), plain)
    other.ids = reader.ids
    unwatched = [other.read(0, 110), other.read(110, 111)]
    fused = "contrib" in request.node.name
    for one, two in zip(watched, unwatched, strict=True):
        assert np.abs(one - two).max() <= (MAX_ABS if fused else 0)
    assert other.request.image_mass is None


def test_graphs_without_it_have_no_such_output(tiny_checkpoint: Tiny) -> None:
    config, weights, _ = model_of(tiny_checkpoint("llama"), "hybrid")
    names = [
        [port.get_any_name() for port in build_openvino(settings, weights).outputs]
        for settings in (config, replace(config, spin_scores=False))
    ]
    assert names == [["logits", IMAGE_MASS], ["logits"]]


def test_settings_without_a_mass(tiny_checkpoint: Tiny) -> None:
    config, weights, _ = scrambled_decoder(tiny_checkpoint("llama"), ("softmax",) * 3, "q_head")
    with pytest.raises(UsageError, match=r"spin_scores given without spin; give one"):
        replace(config, spin_scores=True)
    with pytest.raises(UsageError, match=r"score 'logit', which is no share of attention"):
        replace(config, spin=replace(SPIN, score="logit"), spin_scores=True)
    assert replace(config, spin=WATCHED).spin is None
    assert replace(config, spin=WATCHED, spin_scores=True).spin == WATCHED
    lolcats = replace(config, mixers=("lolcats",) * 3, spin=WATCHED, spin_scores=True)
    with pytest.raises(UnsupportedError, match=r"layer 0: SPIN is baked into softmax and LAW"):
        build_openvino(lolcats, weights)
