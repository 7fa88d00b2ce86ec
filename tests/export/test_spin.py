"""SPIN in the graphs of both engines against the torch decoder, call by call."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino as ov
import pytest
import torch

from edgekit.bundle import StateRecord
from edgekit.errors import UnsupportedError, UsageError
from edgekit.export.states import state_records
from edgekit.export.to_onnx import write_onnx
from edgekit.export.to_openvino import build_openvino
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder
from edgekit.models.spin import SpinConfig
from edgekit.models.weights import MemoryStore, OverlayStore, WeightStore
from edgekit.runtime.state import state_shape
from edgekit.testing import scrambled_decoder

SPIN = SpinConfig(suppress=2, alpha=0.25)
SUMS = replace(SPIN, score="logit")
LAYOUTS = {
    "softmax": (("softmax",) * 3, "q_head", SPIN),
    "softmax-sums": (("softmax",) * 3, "q_head", SUMS),
    "lawcat-q": (("lawcat",) * 3, "q_head", SPIN),
    "lawcat-kv": (("lawcat",) * 3, "kv_head", SPIN),
    "hybrid": (("softmax", "lawcat", "softmax"), "kv_head", SPIN),
    "hybrid-sums": (("softmax", "lawcat", "softmax"), "kv_head", replace(SUMS, layers=(2, 3))),
}
BLOCKS = (1, 7, 64, 65, 1, 1, 70, 1)
MAX_ABS = 1e-4
PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def model_of(
    checkpoint: Path, layout: str, *, spun: bool = True, said: bool = False, **options: Any
) -> tuple[DecoderConfig, WeightStore, Decoder]:
    """A decoder whose heads look at very different things; `options` change its SPIN.

    `said`: its graphs say how far they look.
    """
    mixers, sharing, given = LAYOUTS[layout]
    spin = replace(given, **options) if spun else None
    config, weights, _ = scrambled_decoder(checkpoint, mixers, sharing)
    sharp = {n: 5 * weights.tensor(n) for n in weights if n.endswith("q_proj.weight")}
    weights = OverlayStore(MemoryStore(sharp), weights)
    config = replace(config, spin=spin, spin_scores=said)
    return config, weights, Decoder.from_store(config, weights)


def sequence(config: DecoderConfig, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and where images lie: two in the first row, one late in the second."""
    ids = torch.randint(0, config.vocab_size, (rows, sum(BLOCKS)))
    image = torch.zeros(ids.shape, dtype=torch.bool)
    image[0, 3:20] = image[0, 60:90] = True
    image[1:, 100:120] = True
    return ids, image


class Caller:
    """Feeds a graph as a runtime would, and keeps the mask of all columns so far."""

    def __init__(self) -> None:
        self.mask: np.ndarray | None = None

    def __call__(
        self,
        given: torch.Tensor,
        image: torch.Tensor,
        mask: torch.Tensor | None = None,
        beam: list[int] | None = None,
    ) -> np.ndarray:
        """Logits of the last position `[B, V]`, after ids `[B, T]` or embeddings `[B, T, D]`."""
        new = np.ones(given.shape[:2], np.int64) if mask is None else mask.numpy()
        rows = list(range(len(given))) if beam is None else beam
        before = new[:, :0] if self.mask is None else self.mask[rows]
        self.mask = np.concatenate((before, new), axis=1)
        feed = {
            "input_ids": given.numpy(),
            "inputs_embeds": given.numpy(),
            "attention_mask": self.mask,
            "position_ids": np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -given.shape[1] :],
            "spin_image_mask": image.long().numpy(),
            "beam_idx": np.array(rows, np.int32),
        }
        return self.called(feed)

    def called(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        """The engine's part; `feed` has more than the graph reads."""
        raise NotImplementedError


class OpenVino(Caller):
    """One infer request."""

    def __init__(self, config: DecoderConfig, weights: WeightStore) -> None:
        super().__init__()
        model = build_openvino(config, weights)
        self.compiled = ov.Core().compile_model(model, "CPU", PRECISE)
        self.request = self.compiled.create_infer_request()
        self.names = {name for port in model.inputs for name in port.get_names()}

    def called(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        return self.request.infer({n: feed[n] for n in self.names})["logits"][:, -1].copy()

    def carried(self, record: StateRecord) -> np.ndarray:
        (found,) = (s for s in self.request.query_state() if s.name == record.openvino)
        return found.state.data


class Onnx(Caller):
    """One ONNX Runtime session; every call allocates its states."""

    def __init__(self, config: DecoderConfig, weights: WeightStore, ops: str) -> None:
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            write_onnx(config, weights, Path(folder), ops=ops)
            self.session = onnxruntime.InferenceSession(Path(folder) / "model.onnx")
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.records = state_records(config)
        self.one_row = ops == "contrib"  # GroupQueryAttention takes later blocks row by row
        self.states: dict[str, np.ndarray] = {}

    def called(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        batch, length = feed["input_ids"].shape[:2]
        for record in self.records:
            empty = np.zeros(state_shape(record, "onnx", batch, 0), np.float32)
            past = self.states.get(record.onnx[1])
            feed[record.onnx[0]] = empty if past is None else past[feed["beam_idx"]]
        read = {name: array for name, array in feed.items() if name in self.inputs}
        apart = self.one_row and length > 1 and bool(self.states)
        parts = [slice(i, i + 1) for i in range(batch)] if apart else [slice(None)]
        found = [self.session.run(self.outputs, {n: x[p] for n, x in read.items()}) for p in parts]
        joined = [np.concatenate(arrays) for arrays in zip(*found, strict=True)]
        self.states = dict(zip(self.outputs, joined, strict=True))
        return self.states["logits"][:, -1]

    def carried(self, record: StateRecord) -> np.ndarray:
        return self.states[record.onnx[1]]


ENGINES: dict[str, Callable[..., Any]] = {
    "openvino": OpenVino,
    "contrib": functools.partial(Onnx, ops="contrib"),
    "portable": functools.partial(Onnx, ops="portable"),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return ENGINES[request.param]


def reference(
    decoder: Decoder, ids: torch.Tensor, image: torch.Tensor, mask: torch.Tensor | None = None
) -> np.ndarray:
    with torch.inference_mode():
        return decoder(ids, image=image, mask=mask, form="parallel")[0].numpy()


@pytest.mark.parametrize("lowering", ["topk", "rank"])
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        (family, layout)
        for family in ("llama", "qwen3", "gemma3_text")
        for layout in LAYOUTS
        if not (family == "gemma3_text" and layout.endswith("sums"))
    ],
)
def test_ragged_blocks_equal_one_pass(
    family: str,
    layout: str,
    lowering: str,
    engine: Callable[..., Any],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint(family), layout, lowering=lowering)
    ids, image = sequence(config, 2)
    expected = reference(decoder, ids, image)
    plain = reference(model_of(tiny_checkpoint(family), layout, spun=False)[2], ids, image)
    assert np.abs(expected[:, -1] - plain[:, -1]).max() > 100 * MAX_ABS
    call, end = engine(config, weights), 0
    for size in BLOCKS:
        part = slice(end, end + size)
        logits = call(ids[:, part], image[:, part])
        end += size
        assert np.abs(logits - expected[:, end - 1]).max() <= MAX_ABS, (size, end)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_position_of_each_call(
    layout: str, engine: Callable[..., Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), layout, queries="last")
    ids, image = sequence(config, 2)
    call, end, state = engine(config, weights), 0, None
    for size in BLOCKS:
        part = slice(end, end + size)
        with torch.inference_mode():
            expected, state = decoder(ids[:, part], image=image[:, part], state=state)
        logits = call(ids[:, part], image[:, part])
        end += size
        assert np.abs(logits - expected[:, -1].numpy()).max() <= MAX_ABS, (size, end)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_rows_and_beams(
    layout: str, engine: Callable[..., Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), layout)
    ids, image = sequence(config, 2)
    mask = torch.ones_like(ids)
    mask[1, :95] = 0
    ids[1, :95], image[1, :95] = 0, False
    call = engine(config, weights)
    call(ids[:, :120], image[:, :120], mask[:, :120])
    following, none = ids[:, 120:121], torch.zeros(3, 1, dtype=torch.bool)
    rows = [1, 0, 1]
    logits = call(following[rows], none, beam=rows)
    for logit, row in zip(logits, rows, strict=True):
        start = int((mask[row] == 0).sum())
        alone = ids[row : row + 1, start:121], image[row : row + 1, start:121]
        assert np.abs(logit - reference(decoder, *alone)[0, -1]).max() <= MAX_ABS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_image_is_the_plain_graph(
    layout: str, engine: Callable[..., Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    config, weights, _ = model_of(tiny_checkpoint("llama"), layout)
    ids, image = sequence(config, 2)
    spun, none = engine(config, weights), torch.zeros_like(image)
    plain = engine(replace(config, spin=None), weights)
    for part in (slice(0, 70), slice(70, 71)):
        difference = spun(ids[:, part], none[:, part]) - plain(ids[:, part], none[:, part])
        assert np.abs(difference).max() <= MAX_ABS / 10


@pytest.mark.parametrize("layout", ["softmax", "softmax-sums", "hybrid", "hybrid-sums"])
@pytest.mark.parametrize("spun", [False, True], ids=["plain", "spin"])
def test_embeddings_stand_for_tokens(
    layout: str,
    spun: bool,
    engine: Callable[..., Any],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), layout, spun=spun)
    x = torch.randn(2, 90, config.hidden_size)
    image = sequence(config, 2)[1][:, :90]
    call = engine(replace(config, reads="embeddings"), weights)
    with torch.inference_mode():
        expected = decoder(x, image=image)[0].numpy()
    for start, end in ((0, 70), (70, 71), (71, 72)):
        logits = call(x[:, start:end], image[:, start:end])
        assert np.abs(logits - expected[:, end - 1]).max() <= MAX_ABS


@pytest.mark.parametrize("layout", ["softmax", "softmax-sums", "hybrid", "hybrid-sums"])
def test_the_flag_channel_says_where_images_lie(
    layout: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), layout)
    x, image = torch.randn(2, 90, config.hidden_size), sequence(config, 2)[1][:, :90]
    flagged = torch.cat((x, image[..., None].float()), dim=2)
    with torch.inference_mode():
        expected = decoder(x, image=image)[0].numpy()
    call = OpenVino(replace(config, reads="embeddings", image_flag=True), weights)
    assert "spin_image_mask" not in call.names
    for start, end in ((0, 70), (70, 71)):
        logits = call(flagged[:, start:end], image[:, start:end])
        assert np.abs(logits - expected[:, end - 1]).max() <= MAX_ABS
    with pytest.raises(UnsupportedError, match="OpenVINO graph"):
        Onnx(replace(config, reads="embeddings", image_flag=True), weights, "contrib")
    with pytest.raises(UsageError, match="it is a channel of embeddings"):
        replace(config, image_flag=True)


def test_only_chosen_layers_are_gated(
    engine: Callable[..., Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), "hybrid", layers=(1, 3))
    ids, image = sequence(config, 2)
    logits = engine(config, weights)(ids, image)
    assert np.abs(logits - reference(decoder, ids, image)[:, -1]).max() <= MAX_ABS


@pytest.mark.parametrize(
    ("layout", "scores"),
    [("softmax", False), ("softmax", True), ("softmax-sums", False)],
    ids=["mass", "mass-said", "sums"],
)
@pytest.mark.parametrize("options", [{}, {"queries": "last"}, {"suppress": 0}], ids=str)
def test_attention_stays_fused(
    layout: str, scores: bool, options: dict[str, Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    """One node per layer in the compiled graph, and no softmax of ours."""
    config, weights, _ = model_of(tiny_checkpoint("llama"), layout, said=scores, **options)
    runtime = OpenVino(config, weights).compiled.get_runtime_model()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in runtime.get_ops()]
    assert sum("ScaledDotProductAttention" in kind for kind in kinds) == 3
    assert not [kind for kind in kinds if "Softmax" in kind or "SoftMax" in kind]


def test_sums_of_keys_are_not_for_sliding_layers(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError, match="sliding layers such as 0 forget them"):
        model_of(tiny_checkpoint("gemma3_text"), "softmax-sums")


def test_sums_of_keys_are_the_torch_decoders(
    engine: Callable[..., Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    """Constant in size, with the number of image keys; a padded image token is none."""
    config, weights, decoder = model_of(tiny_checkpoint("llama"), "softmax-sums")
    ids, image = sequence(config, 2)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    call = engine(config, weights)
    with torch.inference_mode():
        state = decoder(ids, image=image, mask=mask)[1]
    call(ids[:, :70], image[:, :70], mask[:, :70])
    call(ids[:, 70:71], image[:, 70:71], mask[:, 70:71])
    call(ids[:, 71:], image[:, 71:], mask[:, 71:])
    records = [record for record in state_records(config) if record.kind == "spin"]
    assert [record.layer for record in records] == [0, 1, 2]
    for record in records:
        expected = state[record.layer]["spin"].numpy()
        actual = call.carried(record)
        assert actual.shape == expected.shape == (2, *record.shape[1:])
        assert expected[:, :, -1].tolist() == [[40.0] * 2, [20.0] * 2]
        assert np.abs(actual - expected).max() <= MAX_ABS


@pytest.mark.parametrize("score", ["mass", "logit"])
@pytest.mark.parametrize("nothing", [{"suppress": 0}, {"suppress": 2, "alpha": 1.0}])
def test_settings_that_change_nothing_leave_the_plain_graph(
    nothing: dict[str, Any],
    score: str,
    engine: Callable[..., Any],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    config, weights, _ = model_of(tiny_checkpoint("llama"), "softmax", spun=False)
    inert = replace(config, spin=SpinConfig(score=score, **nothing))
    assert state_records(inert) == state_records(config)
    ids, image = sequence(config, 2)
    calls = engine(inert, weights), engine(config, weights)
    for part in (slice(0, 70), slice(70, 71)):
        one, other = (call(ids[:, part], image[:, part]) for call in calls)
        np.testing.assert_array_equal(one, other)


def test_lolcats_layers_are_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    config, weights, _ = scrambled_decoder(tiny_checkpoint("llama"), ("lolcats",) * 3, "q_head")
    for engine in ENGINES.values():
        with pytest.raises(UnsupportedError, match=r"layer 0: SPIN is baked into softmax and LAW"):
            engine(replace(config, spin=SPIN), weights)
