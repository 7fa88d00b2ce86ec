"""The ONNX graph against the torch decoder, at the level of single calls."""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from edgekit.errors import UsageError
from edgekit.export.blockwise import dequantise, quantise
from edgekit.export.states import input_names, state_records
from edgekit.export.to_onnx import write_onnx
from edgekit.models.config import DecoderConfig, LolcatsConfig
from edgekit.models.decoder import Decoder
from edgekit.models.weights import MemoryStore, OverlayStore, WeightStore
from edgekit.testing import scrambled_decoder

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
LAYOUTS = {
    "softmax": (("softmax",) * 3, "q_head"),
    "lawcat-q": (("lawcat",) * 3, "q_head"),
    "lawcat-kv": (("lawcat",) * 3, "kv_head"),
    "hybrid": (("lawcat", "softmax", "lawcat"), "kv_head"),
    "lolcats": (("lolcats",) * 3, "q_head"),
    "three-mixers": (("lolcats", "softmax", "lawcat"), "q_head"),
}
OPS = ("contrib", "portable")
BLOCKS = (1, 2, 61, 3, 64, 65, 1, 1, 130, 1)  # below, at, above and across chunks of 64
MAX_ABS = 1e-4
ALL = 1 << 20
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TABLES = ("embed_tokens", "lm_head")
Checkpoint = Callable[..., Path]


def model_of(
    checkpoint: Path, layout: str, **lawcat: object
) -> tuple[DecoderConfig, WeightStore, Decoder]:
    return scrambled_decoder(checkpoint, *LAYOUTS[layout], **lawcat)


def session_of(directory: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    path = directory / "model.onnx"
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Caller:
    """Feeds the graph as a runtime would, carrying fresh states from call to call."""

    def __init__(self, config: DecoderConfig, directory: Path, batch: int = 1) -> None:
        self.session = session_of(directory)
        self.records, self.names = state_records(config), input_names(config)
        self.mask = np.zeros((batch, 0), np.int64)
        self.states = {
            record.onnx[0]: np.zeros([batch, *(max(n, 0) for n in record.shape[1:])], np.float32)
            for record in self.records
        }

    def __call__(
        self, ids: torch.Tensor, mask: np.ndarray | None = None, keep: int | None = None
    ) -> np.ndarray:
        new = np.ones(ids.shape, np.int64) if mask is None else mask
        self.mask = np.concatenate((self.mask, new), axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feed = {
            "input_ids": ids.numpy(),
            "attention_mask": self.mask,
            "position_ids": positions,
        }
        extra = {} if keep is None else {"logits_to_keep": np.array(keep, np.int64)}
        outputs = [record.onnx[1] for record in self.records]
        logits, *after = self.session.run(
            ["logits", *outputs], {n: feed[n] for n in self.names} | self.states | extra
        )
        self.states = dict(zip(self.states, after, strict=True))
        return logits


def operators(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from operators(attribute.g)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_blocks_equal_one_pass(
    family: str, layout: str, ops: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint(family), layout)
    write_onnx(config, weights, tmp_path, ops=ops)
    call, end = Caller(config, tmp_path), 0
    ids = torch.randint(0, config.vocab_size, (1, sum(BLOCKS)))
    with torch.inference_mode():
        expected, _ = decoder(ids, form="parallel")
    for size in BLOCKS:
        logits = call(ids[:, end : end + size], keep=ALL)
        assert np.abs(logits - expected[:, end : end + size].numpy()).max() <= MAX_ABS, (size, end)
        end += size


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_left_padding_is_a_no_op(
    family: str, layout: str, ops: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint(family), layout)
    write_onnx(config, weights, tmp_path, ops=ops)
    lengths, width = (3, 70, 131), 131
    ids = torch.randint(0, config.vocab_size, (3, width + 2))
    mask = np.array([[0] * (width - n) + [1] * n for n in lengths])
    call = Caller(config, tmp_path, 3)
    padded = [call(ids[:, :width], mask), call(ids[:, width:-1]), call(ids[:, width + 1 :])]
    for row, length in enumerate(lengths):
        with torch.inference_mode():
            alone, _ = decoder(ids[row : row + 1, width - length :])
        for step, logits in enumerate(padded):
            assert np.abs(logits[row, 0] - alone[0, step - 3].numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("layout", ["lawcat-q", "lawcat-kv"])
def test_padding_in_a_later_call_is_a_no_op(
    layout: str, ops: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), layout)
    write_onnx(config, weights, tmp_path, ops=ops)
    ids = torch.randint(0, config.vocab_size, (1, 90))
    mask = np.ones((1, 90), np.int64)
    mask[:, 40:49] = 0
    with torch.inference_mode():
        expected, _ = decoder(ids, mask=torch.from_numpy(mask))
    call = Caller(config, tmp_path)
    call(ids[:, :40], mask[:, :40])
    logits = call(ids[:, 40:], mask[:, 40:])
    assert np.abs(logits[0, 0] - expected[0, -1].numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_rope_on_the_recurrent_path(
    family: str, ops: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint(family), "lawcat-q", position="rope")
    write_onnx(config, weights, tmp_path, ops=ops)
    ids = torch.randint(0, config.vocab_size, (2, 70))
    with torch.inference_mode():
        expected, _ = decoder(ids)
    call = Caller(config, tmp_path, 2)
    call(ids[:, :66])
    assert np.abs(call(ids[:, 66:])[:, 0] - expected[:, -1].numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("layout", ["lawcat-q", "lawcat-kv"])
@pytest.mark.parametrize("ablation", ["conv", "normaliser"])
def test_ablations(
    ablation: str, layout: str, ops: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("qwen3"), layout, **{ablation: False})
    write_onnx(config, weights, tmp_path, ops=ops)
    ids = torch.randint(0, config.vocab_size, (2, 70))
    mask = np.ones((2, 70), np.int64)
    mask[0, :9] = 0
    with torch.inference_mode():
        expected, _ = decoder(ids, mask=torch.from_numpy(mask))
    call = Caller(config, tmp_path, 2)
    for start, end in ((0, 66), (66, 69), (69, 70)):
        logits = call(ids[:, start:end], mask[:, start:end])
        assert np.abs(logits[:, 0] - expected[:, end - 1].numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("window", [1, 16, 100])
def test_windows_of_another_size_and_scale(
    window: int, ops: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, _ = model_of(tiny_checkpoint("qwen3"), "lolcats")
    options = LolcatsConfig(window=window, common_scale=False)
    config = config.with_mixers(config.mixers, lolcats=options)
    write_onnx(config, weights, tmp_path, ops=ops)
    ids = torch.randint(0, config.vocab_size, (1, 150))
    with torch.inference_mode():
        expected, _ = Decoder.from_store(config, weights)(ids, form="parallel")
    call = Caller(config, tmp_path)
    logits = np.concatenate([call(ids[:, :140], keep=ALL), call(ids[:, 140:], keep=ALL)], axis=1)
    assert np.abs(logits - expected.numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("ops", OPS)
def test_steep_gates_stay_finite(ops: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    config, weights, _ = model_of(tiny_checkpoint("llama"), "lawcat-kv")
    name = "model.layers.1.self_attn.gate_up.bias"
    steep = torch.linspace(-200, 200, len(weights.tensor(name)))
    weights = OverlayStore(MemoryStore({name: steep}), weights)
    decoder = Decoder.from_store(config, weights)
    write_onnx(config, weights, tmp_path, ops=ops)
    ids = torch.randint(0, config.vocab_size, (1, 150))
    with torch.inference_mode():
        expected, _ = decoder(ids, form="recurrent")
    logits = Caller(config, tmp_path)(ids, keep=ALL)
    assert np.abs(logits - expected.numpy()).max() <= MAX_ABS


@pytest.mark.parametrize("keep", [None, 1, 3, 20, ALL], ids=str)
def test_logits_to_keep(keep: int | None, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), "hybrid")
    write_onnx(config, weights, tmp_path)
    ids = torch.randint(0, config.vocab_size, (2, 20))
    with torch.inference_mode():
        expected, _ = decoder(ids)
    kept = expected[:, -min(keep or 1, 20) :].numpy()
    logits = Caller(config, tmp_path, 2)(ids, keep=keep)
    assert logits.shape == kept.shape
    assert np.abs(logits - kept).max() <= MAX_ABS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_may_be_updated_in_place(
    layout: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, decoder = model_of(tiny_checkpoint("llama"), layout)
    write_onnx(config, weights, tmp_path)
    ids = torch.randint(0, config.vocab_size, (1, 40))
    with torch.inference_mode():
        expected, _ = decoder(ids)
    session = session_of(tmp_path)
    binding = session.io_binding()
    for record in state_records(config):
        shape = [1, *(64 if n < 0 else n for n in record.shape[1:])]  # room for 64 tokens
        buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
        binding.bind_ortvalue_input(record.onnx[0], buffer)
        binding.bind_ortvalue_output(record.onnx[1], buffer)
    logits = np.empty((1, 1, config.vocab_size), np.float32)
    binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
    for start, end in ((0, 7), (7, 38), (38, 39), (39, 40)):
        binding.bind_cpu_input("input_ids", ids[:, start:end].numpy())
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        if config.needs_positions:
            binding.bind_cpu_input("position_ids", np.arange(start, end)[None])
        session.run_with_iobinding(binding)
        assert np.abs(logits[0, 0] - expected[0, end - 1].numpy()).max() <= MAX_ABS


def stored_as(weights: WeightStore, weights_format: str) -> WeightStore:
    """What the graph's weights mean in fp32."""
    changed = {}
    for name in weights:
        module = name.removesuffix(".weight").rpartition(".")[2]
        if not name.endswith(".weight") or module not in LINEAR + TABLES:
            continue
        tensor = weights.tensor(name)
        if weights_format == "fp16":
            changed[name] = tensor.half().float()
        else:
            bits = 4 if weights_format == "int4" and module in LINEAR else 8
            changed[name] = torch.from_numpy(dequantise(quantise(tensor.numpy(), bits)))
    return OverlayStore(MemoryStore(changed), weights)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["softmax", "lawcat-q", "lawcat-kv"])
@pytest.mark.parametrize(
    ("weights_format", "bound"),
    # Quantised products take their activations in int8 too, so they only come close.
    [("fp16", 2e-5), ("int8", 0.03), ("int4", 0.03)],
    ids=["fp16", "int8", "int4"],
)
def test_formats_mean_what_they_say(
    weights_format: str,
    bound: float,
    layout: str,
    tied: bool,
    ops: str,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    # A hidden width of 80 is no multiple of the block.
    sizes = {"hidden_size": 80, "head_dim": 16, "tie_word_embeddings": tied}
    config, weights, _ = model_of(tiny_checkpoint("qwen3", **sizes), layout)
    write_onnx(config, weights, tmp_path, ops=ops, weights_format=weights_format)
    meant = Decoder.from_store(config, stored_as(weights, weights_format))
    ids = torch.randint(0, config.vocab_size, (1, 80))
    with torch.inference_mode():
        expected = meant(ids)[0].numpy()
    call = Caller(config, tmp_path)
    logits = np.concatenate([call(ids[:, :78], keep=ALL), call(ids[:, 78:], keep=ALL)], axis=1)
    error = np.sqrt(((logits - expected) ** 2).mean() / (expected**2).mean())
    assert error <= bound


@pytest.mark.parametrize("weights_format", ["fp32", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_portable_graph_is_standard(
    layout: str, weights_format: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, _ = model_of(tiny_checkpoint("qwen3"), layout)
    write_onnx(config, weights, tmp_path, ops="portable", weights_format=weights_format)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert {node.domain for node in operators(model.graph)} == {""}


def test_contrib_graph_is_stamped_and_named(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    config, weights, _ = model_of(tiny_checkpoint("llama"), "hybrid")
    write_onnx(config, weights, tmp_path, weights_format="int4")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets == {"": 21, "com.microsoft": 1}
    assert model.ir_version == 10
    names = {node.name for node in model.graph.node}
    assert {"model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj", "lm_head"} <= names
    kinds = {node.op_type for node in model.graph.node}
    fused = {"LinearAttention", "CausalConvWithState", "GroupQueryAttention", "MatMulNBits"}
    assert fused <= kinds


def test_states_are_the_manifest_table(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    config, weights, _ = model_of(tiny_checkpoint("llama"), "hybrid")
    write_onnx(config, weights, tmp_path)
    session = session_of(tmp_path)
    shapes = {
        port.name: tuple(n if isinstance(n, int) else -1 for n in port.shape)
        for port in (*session.get_inputs(), *session.get_outputs())
    }
    for record in state_records(config):
        assert [shapes[name] for name in record.onnx] == [record.shape] * 2


def test_tied_table_is_stored_once(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    sizes = []
    for tied in (True, False):
        checkpoint = tiny_checkpoint("llama", tie_word_embeddings=tied)
        config, weights, _ = model_of(checkpoint, "lawcat-kv")
        out = tmp_path / str(tied)
        out.mkdir()
        write_onnx(config, weights, out, weights_format="int4")
        sizes.append((out / "model.onnx.data").stat().st_size)
    assert sizes[1] - sizes[0] >= config.vocab_size * config.hidden_size


@pytest.mark.parametrize("wrong", [{"ops": "fused"}, {"weights_format": "int3"}], ids=str)
def test_unknown_settings_are_refused(
    wrong: dict[str, object], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config, weights, _ = model_of(tiny_checkpoint("llama"), "softmax")
    with pytest.raises(UsageError, match="allowed"):
        write_onnx(config, weights, tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.peer
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "three-mixers"])
def test_onnxruntime_genai_says_the_same(
    layout: str, ops: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    genai = importlib.import_module("onnxruntime_genai")
    checkpoint = tiny_checkpoint("llama")
    config, weights, decoder = model_of(checkpoint, layout)
    write_onnx(config, weights, tmp_path, ops=ops)
    for path in checkpoint.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = genai.Model(str(tmp_path))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=40)
    generator = genai.Generator(model, settings)
    ids = [5, 17, 99, 250, 31]
    generator.append_tokens(np.array(ids, np.int32))
    while len(ids) < 30:
        with torch.inference_mode():
            ids.append(int(decoder(torch.tensor([ids]))[0][0, -1].argmax()))
        if ids[-1] in config.eos_token_ids:
            break
        generator.generate_next_token()
        assert list(generator.get_sequence(0)) == ids
