"""A whole tuning: what it writes opens elsewhere, what it says of itself is true."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgekit.adapters.tune.manifest import read_tune
from edgekit.adapters.tune.model import load_tuned, open_base
from edgekit.adapters.tune.recipe import Recipe
from edgekit.adapters.tune.recorder import FILE, read_records
from edgekit.adapters.tune.run import Settings, tune
from edgekit.bundle import describe_files
from edgekit.errors import BundleError, SourceError, TrainingError, UnsupportedError, UsageError
from edgekit.models.decoder import Decoder
from edgekit.testing import TOLERANCE, assert_close, relative_error, write_tiny_student

Small = Callable[..., Recipe]
Tune = Callable[..., Path]
SETTINGS = Settings(cpu=True, precision="fp32")
METHODS = ("aflora", "lora", "vera")
SIZES = {  # out and in of each default target
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "up_proj": (96, 64),
    "down_proj": (64, 96),
}
IDS = torch.randint(3, 320, (2, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def tuned(
    checkpoint: Path, examples: Path, small: Small, tmp_path_factory: pytest.TempPathFactory
) -> Tune:
    """The adapter of a run that nothing disturbs, made once by method."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            out = tmp_path_factory.mktemp(method) / "adapter"
            report = tune(checkpoint, out, small(method), data=[examples], settings=SETTINGS)
            assert report.finished
            made[method] = out
        return made[method]

    return make


@torch.no_grad()
def in_transformers(checkpoint: Path, adapter: Path | None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", METHODS)
def test_it_opens_in_transformers_and_says_the_same(
    tuned: Tune, checkpoint: Path, method: str
) -> None:
    out = tuned(method)
    with torch.no_grad():
        ours = load_tuned(open_base(checkpoint), out, "fp32").decoder(IDS)[0]
    assert_close("logits", ours, in_transformers(checkpoint, out), ratio=TOLERANCE["float32"])
    assert relative_error(in_transformers(checkpoint, None), ours) > 0.01
    if method == "aflora":
        folded = in_transformers(checkpoint, out / "lora")
        assert_close("folded", ours, folded, ratio=TOLERANCE["float32"])


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_there_and_recorded(
    tuned: Tune, checkpoint: Path, examples: Path, method: str
) -> None:
    out = tuned(method)
    manifest = read_tune(out)
    found = describe_files(out)
    assert found.pop("tune.json")
    assert manifest.files == found
    pictures = {"loss.png"} | ({"freeze.png"} if method == "aflora" else set())
    folded = {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    expected = {"adapter_config.json", "adapter_model.safetensors", FILE} | pictures
    assert set(found) == expected | (folded if method == "aflora" else set())
    assert not list(out.parent.glob("*.run"))
    assert manifest.order == ("tune",)
    assert manifest.base["sha256"] == open_base(checkpoint).source.identity["sha256"]
    assert manifest.data[0]["name"] == examples.name
    assert (manifest.data[0]["rows"], manifest.rows, manifest.steps) == (30, 48, 12)
    assert manifest.recipe["method"] == method
    assert [record["step"] for record in read_records(out / FILE)] == list(range(12))
    assert manifest.metrics["loss"] < read_records(out / FILE)[0]["loss"]


def elements(method: str) -> tuple[int, int]:
    """Of all projections, and of all vectors, over the three layers."""
    rank = 2
    matrices = sum(rank * (out + inner) for out, inner in SIZES.values())
    vectors = sum(out + rank for out, _ in SIZES.values())
    return (0 if method == "vera" else 3 * matrices), (0 if method == "lora" else 3 * vectors)


@pytest.mark.parametrize("method", METHODS)
def test_counted_elements_and_bytes(tuned: Tune, method: str) -> None:
    manifest = read_tune(tuned(method))
    matrices, vectors = elements(method)
    assert manifest.trainable.start == matrices + vectors
    if method != "aflora":
        assert manifest.trainable.end == manifest.trainable.mean == matrices + vectors
        held = 3 * 4 * (matrices + vectors)  # gradient and two moments, fp32
        tensors = 2 * 15  # each has a step count too
        assert manifest.memory.peak == manifest.memory.end == held + 4 * tensors
        assert (manifest.memory.scores, manifest.freezes) == (0, ())
        return
    assert manifest.trainable.end == vectors
    sizes = {"aflora_A": 1, "aflora_B": 0}
    lived = sum(
        2 * SIZES[str(event["module"]).rpartition(".")[2]][sizes[event["part"]]] * event["step"]
        for event in manifest.freezes
    )
    assert len(manifest.freezes) == 30
    assert manifest.trainable.mean == pytest.approx(vectors + lived / 12)
    memory = manifest.memory
    assert memory.peak == memory.optimizer + memory.gradients + memory.scores
    assert memory.gradients == 4 * (matrices + vectors)
    assert memory.end == 3 * 4 * vectors + 4 * 30


def test_micro_batches_change_nothing_but_rounding(
    checkpoint: Path, examples: Path, small: Small, tuned: Tune, tmp_path: Path
) -> None:
    plan = small("lora", micro_batch=4)
    tune(checkpoint, tmp_path / "a", plan, data=[examples], settings=SETTINGS)
    losses = [
        torch.tensor([r["loss"] for r in read_records(out / FILE)])
        for out in (tuned("lora"), tmp_path / "a")
    ]
    assert_close("losses", *losses, ratio=1e-4)


def test_bf16_comes_close(
    checkpoint: Path, examples: Path, small: Small, tuned: Tune, tmp_path: Path
) -> None:
    narrow = Settings(cpu=True, precision="bf16")
    tune(checkpoint, tmp_path / "a", small("aflora"), data=[examples], settings=narrow)
    wide = [r["loss"] for r in read_records(tuned("aflora") / FILE)]
    losses = [r["loss"] for r in read_records(tmp_path / "a" / FILE)]
    assert losses != wide
    assert losses == pytest.approx(wide, rel=0.05)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def student(checkpoint: Path, folder: Path) -> Path:
    return write_tiny_student(folder, checkpoint, ("lawcat", "softmax", "lawcat"))


def test_students_are_tuned_after_they_were_distilled(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path
) -> None:
    made = student(checkpoint, tmp_path / "student")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plan = small("aflora", targets=targets)
    report = tune(
        checkpoint, tmp_path / "a", plan, data=[examples], student=made, settings=SETTINGS
    )
    manifest = read_tune(report.out)
    assert manifest.order == ("distil", "tune")
    assert manifest.student is not None
    assert (manifest.student["name"], manifest.student["mixers"][1]) == ("tiny", "softmax")
    names = set(load_file(report.out / "adapter_model.safetensors"))
    adapted = {name.split(".")[-2] for name in names}
    assert adapted == set(targets)
    before = Decoder.from_store(*_opened(checkpoint, made))
    after = load_tuned(open_base(checkpoint, made), report.out, "fp32").decoder
    with torch.no_grad():
        assert relative_error(before(IDS)[0], after(IDS)[0]) > 0.01
    with pytest.raises(UsageError, match="give the teacher as SOURCE, and --student"):
        tune(made, tmp_path / "b", plan, data=[examples], settings=SETTINGS)


def _opened(checkpoint: Path, made: Path) -> Any:
    base = open_base(checkpoint, made)
    return base.config, base.weights


def test_a_student_of_another_model_is_refused(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path, tiny_checkpoint: Any
) -> None:
    made = student(checkpoint, tmp_path / "student")
    with pytest.raises(SourceError, match="was made from"):
        tune(tiny_checkpoint("qwen3"), tmp_path / "a", small("lora"), data=[examples], student=made)
    assert not (tmp_path / "a.run").exists()


def test_some_layers_only(checkpoint: Path, examples: Path, small: Small, tmp_path: Path) -> None:
    plan = small("lora", layers=[1], targets=["o_proj", "gate_proj"], steps=2)
    report = tune(checkpoint, tmp_path / "a", plan, data=[examples], settings=SETTINGS)
    names = {
        n.removeprefix("base_model.model.")
        for n in load_file(report.out / "adapter_model.safetensors")
    }
    assert {name.split(".lora_")[0] for name in names} == {
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj",
    }
    with pytest.raises(UsageError, match="layer 3 given; allowed: 0 to 2"):
        tune(checkpoint, tmp_path / "b", small("lora", layers=[3]), data=[examples])


def test_lora_freezes_by_plan_too(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path
) -> None:
    frozen = {"freeze__at_start": ["*_A"], "freeze__schedule": "never"}
    plan = small("lora", steps=3, **frozen)
    manifest = tune(checkpoint, tmp_path / "a", plan, data=[examples], settings=SETTINGS).manifest
    assert manifest is not None
    assert {(event["step"], event["part"]) for event in manifest.freezes} == {(-1, "lora_A")}
    assert manifest.trainable.start == 3 * sum(2 * out for out, _ in SIZES.values())
    assert (tmp_path / "a" / "freeze.png").is_file()


def test_epochs(checkpoint: Path, examples: Path, small: Small, tmp_path: Path) -> None:
    plan = small("aflora", steps=0, epochs=2.0, freeze__t_init="1ep", freeze__t_final="0.5ep")
    manifest = tune(checkpoint, tmp_path / "a", plan, data=[examples], settings=SETTINGS).manifest
    assert manifest is not None
    assert manifest.steps == 16
    assert min(event["step"] for event in manifest.freezes) == 10


def test_held_out_examples_measure_base_and_adapter(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path
) -> None:
    report = tune(
        checkpoint,
        tmp_path / "a",
        small("lora"),
        data=[f"{examples}@2"],
        held_out=examples,
        settings=SETTINGS,
    )
    manifest = report.manifest
    assert manifest is not None
    assert manifest.metrics["held_out_loss"] < manifest.metrics["base_held_out_loss"]
    assert manifest.data[0]["times"] == 2
    first = read_records(report.out / FILE)[0]["loss"]
    assert manifest.metrics["base_held_out_loss"] == pytest.approx(first, rel=0.2)


def test_a_loss_that_is_not_finite_stops_it(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path
) -> None:
    plan = small("lora", lr=1e30, warmup=0.0)
    with pytest.raises(TrainingError, match=r"tuning, step [1-9]: the loss or its gradient"):
        tune(checkpoint, tmp_path / "a", plan, data=[examples], settings=SETTINGS)
    assert not (tmp_path / "a").exists()


def test_nothing_is_replaced_unasked(
    checkpoint: Path, examples: Path, small: Small, tuned: Tune, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="exists already"):
        tune(checkpoint, tuned("lora"), small("lora"), data=[examples])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(BundleError, match="is not an edgekit adapter"):
        tune(checkpoint, tmp_path / "mine", small("lora"), data=[examples], force=True)


def test_launchers_are_refused(
    checkpoint: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="one process"):
        tune(checkpoint, tmp_path / "a", small("lora"), data=[])


def test_a_manifest_of_another_format(tuned: Tune, tmp_path: Path) -> None:
    data = json.loads((tuned("lora") / "tune.json").read_text())
    (tmp_path / "tune.json").write_text(json.dumps(data | {"format_version": 9}))
    with pytest.raises(SourceError, match="format 9, this edgekit reads 1"):
        read_tune(tmp_path)
