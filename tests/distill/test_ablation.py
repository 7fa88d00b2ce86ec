"""Ablations: each variant learns what it would learn alone; kill and go on; honest tables."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from edgekit.config import dump
from edgekit.distill.ablation import ablate, main
from edgekit.distill.ablation_plot import draw_ablation
from edgekit.distill.ablation_report import Ablation, as_markdown
from edgekit.distill.assembly import Assembly
from edgekit.distill.estimate import estimate
from edgekit.distill.loop import Run, train
from edgekit.distill.measuring import layer_errors, state_bytes
from edgekit.distill.metrics import read_metrics
from edgekit.distill.processes import Processes
from edgekit.distill.stage import TorchBatch
from edgekit.distill.teaching import View, show_layers
from edgekit.distill.transfer import TransferStage, new_parameters
from edgekit.distill.trial import AblationSettings, Trial
from edgekit.distill.variants import BASE, Variants, load_variants
from edgekit.errors import TrainingError, UsageError
from edgekit.models.decoder import Decoder

SETTINGS = AblationSettings(cpu=True, precision="fp32", held_out_tokens=128, checkpoint_seconds=0)
BASE_TABLE = """
description = "Tiny."
[base]
lawcat.gate_bias_init = 4.0
lolcats.window = 8
transfer = { tokens = 256, length = 32, batch = 2, micro_batch = 1, lr = 1e-2 }
"""
VARIANTS = """
[variants."one state per KV head"]
lawcat.state_sharing = "kv_head"
[variants.LoLCATs]
mixer = "lolcats"
[variants.slow]
transfer.lr = 1e-3
"""
SECONDS = ("seconds", "command")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    return load_variants(write(tmp_path_factory.mktemp("toml") / "v.toml", BASE_TABLE + VARIANTS))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("held-out")
    return [write(folder / f"{name}.txt", f"{name} said no. " * 60) for name in ("ada", "bob")]


@pytest.fixture(scope="module")
def run(
    teacher_directory: Path, text: Path, held_out: list[Path], variants: Variants
) -> Callable[..., Ablation | None]:
    def call(out: Path, given: Variants = variants, **options: Any) -> Ablation | None:
        options = {"settings": SETTINGS} | options
        return ablate(teacher_directory, out, given, data=[text], held_out=held_out, **options)

    return call


@pytest.fixture(scope="module")
def whole(
    run: Callable[..., Ablation | None], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ablation]:
    """An ablation that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "ablation"
    result = run(out, command="as typed")
    assert result is not None
    return out, result


def without_seconds(result: Ablation) -> dict[str, Any]:
    data = dump(result)
    for table in (data, *data["scored"]):
        del table["seconds"]
    return dict(data)


def losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [(r["step"], r["students"]) for r in read_metrics(folder)]


def alone(source: Path, text: Path, variants: Variants, name: str, folder: Path) -> Decoder:
    plan, processes = variants.recipes[name], Processes("fp32", cpu=True)
    work = Assembly.open(source, plan, [text], None, None, processes, None)
    stage = TransferStage(work.teacher, work.student, plan.transfer, processes.autocast)
    folder.mkdir()
    train(
        stage,
        plan.transfer,
        work.mixtures[1].batch,
        Run(folder=folder, processes=processes, fingerprint={}, seed=plan.seed),
    )
    return work.student


def test_every_variant_learns_what_it_learns_alone(
    teacher_directory: Path, text: Path, held_out: list[Path], variants: Variants, tmp_path: Path
) -> None:
    processes = Processes("fp32", cpu=True)
    trial = Trial.open(teacher_directory, variants, [text], held_out, processes, SETTINGS, None)
    (tmp_path / "together").mkdir()
    trial.train(tmp_path / "together", SETTINGS, None)
    for name, student in trial.students.items():
        single = alone(teacher_directory, text, variants, name, tmp_path / name)
        for layer in range(3):
            expected, got = new_parameters(single, layer), new_parameters(student, layer)
            assert expected.keys() == got.keys()
            assert all(torch.equal(tensor, got[key]) for key, tensor in expected.items())


def test_stopped_ablation_goes_on_exactly(
    run: Callable[..., Ablation | None], whole: tuple[Path, Ablation], tmp_path: Path
) -> None:
    hurried, runs, result = replace(SETTINGS, stop_after=0.0), 0, None
    while result is None:
        result, runs = run(tmp_path / "a", settings=hurried), runs + 1
    assert runs == 4
    assert without_seconds(result) == without_seconds(whole[1])
    assert losses(tmp_path / "a") == losses(whole[0])


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", ["transfer: loss", "errors on"], ids=["training", "measuring"])
def test_killed_ablation_goes_on_exactly(
    run: Callable[..., Ablation | None], whole: tuple[Path, Ablation], tmp_path: Path, at: str
) -> None:
    def kill(name: str, number: int, count: int) -> None:
        if name.startswith(at) and number == count - 1:
            raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path / "a", progress=kill)
    assert not (tmp_path / "a" / "ablation.json").exists()
    result = run(tmp_path / "a")
    assert result is not None
    assert without_seconds(result) == without_seconds(whole[1])


def test_unfinished_ablation_of_other_settings_is_refused(
    run: Callable[..., Ablation | None], variants: Variants, tmp_path: Path
) -> None:
    assert run(tmp_path / "a", settings=replace(SETTINGS, stop_after=0.0)) is None
    fewer = {name: plan for name, plan in variants.recipes.items() if name != "slow"}
    with pytest.raises(TrainingError, match=r"variants\.slow was"):
        run(tmp_path / "a", replace(variants, recipes=fewer))


def test_results_are_written_whole(whole: tuple[Path, Ablation]) -> None:
    out, result = whole
    names = ["ablation.json", "ablation.md", "ablation.png", "metrics.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "ablation.json").read_text()) == {
        "command": "as typed",
        **dump(result),
    }
    assert (out / "ablation.md").read_text() == as_markdown(result, "as typed")
    assert len(losses(out)) == 4


def test_table_is_sorted_and_says_what_it_rests_on(whole: tuple[Path, Ablation]) -> None:
    result = whole[1]
    errors = [scored.error.value for scored in result.scored]
    assert errors == sorted(errors)
    assert {scored.name for scored in result.scored} == {
        BASE, "one state per KV head", "LoLCATs", "slow"
    }  # fmt: skip
    by_name = {scored.name: scored for scored in result.scored}
    slow, base = by_name["slow"], by_name[BASE]
    assert slow.against_base is not None
    assert slow.against_base.value == pytest.approx(slow.error.value - base.error.value)
    assert slow.changes == {"transfer.lr": (0.01, 0.001)}
    assert slow.error.value == pytest.approx(sum(slow.layers) / 3)
    assert set(base.perplexity) == set(result.teacher_perplexity) == {"ada", "bob"}
    assert base.seconds > 0
    table = as_markdown(result, "as typed")
    for told in (
        "256 tokens",
        "rows of 32, 2 a step",
        "one seed (0)",
        "8 held-out rows",
        "1 threads",
    ):
        assert told in table
    assert "lawcat.state_sharing q_head → kv_head" in table


def test_some_layers_only(
    run: Callable[..., Ablation | None], whole: tuple[Path, Ablation], tmp_path: Path
) -> None:
    result = run(tmp_path / "a", layers=(2, 0))
    assert result is not None
    assert result.layers == (0, 2)
    assert result.teacher_perplexity == {}
    table = as_markdown(result, "")
    assert "perplexity, " not in table
    assert "layers 0, 2 of 3 only" in table
    everything = {scored.name: scored for scored in whole[1].scored}
    for scored in result.scored:  # layers are independent
        first, _, third = everything[scored.name].layers
        assert scored.layers == pytest.approx((first, third), rel=1e-5)


def test_bf16(
    run: Callable[..., Ablation | None], whole: tuple[Path, Ablation], tmp_path: Path
) -> None:
    result = run(tmp_path / "a", settings=replace(SETTINGS, precision="bf16"))
    assert result is not None
    wide = {scored.name: scored for scored in whole[1].scored}
    for scored in result.scored:
        assert scored.state_bytes == wide[scored.name].state_bytes
        assert scored.error.value == pytest.approx(wide[scored.name].error.value, rel=0.1)
    assert result.teacher_bytes == whole[1].teacher_bytes


def test_variant_whose_loss_explodes_stops_alone(
    run: Callable[..., Ablation | None],
    variants: Variants,
    whole: tuple[Path, Ablation],
    tmp_path: Path,
) -> None:
    plan = variants.recipes["slow"]
    hot = replace(plan, transfer=replace(plan.transfer, lr=1e36))
    result = run(tmp_path / "a", replace(variants, recipes=variants.recipes | {"slow": hot}))
    assert result is not None
    stopped = {scored.name: scored.stopped_at for scored in result.scored}
    assert stopped["slow"] is not None
    assert [name for name, at in stopped.items() if at is None] == [
        scored.name for scored in whole[1].scored if scored.name != "slow"
    ]
    assert f"(stopped at {stopped['slow']} tokens)" in as_markdown(result, "")
    told = {name: loss for name, loss in losses(tmp_path / "a")[-1][1].items() if loss is None}
    assert set(told) == {"slow"}


def test_no_variant_left_is_an_error(
    run: Callable[..., Ablation | None], variants: Variants, tmp_path: Path
) -> None:
    recipes = {
        name: replace(plan, transfer=replace(plan.transfer, lr=1e36))
        for name, plan in variants.recipes.items()
        if plan.mixer == "lawcat"
    }
    with pytest.raises(TrainingError, match=r"first in every student.* lower transfer\.lr"):
        run(tmp_path / "a", replace(variants, recipes=recipes))


def test_error_is_over_the_variance_of_all_rows(
    pair: Callable[..., Any], ids: torch.Tensor
) -> None:
    teacher, student = pair()
    views: list[View] = []
    batch = TorchBatch(ids, ids, None)
    show_layers(teacher, [0, 1, 2], batch, contextlib.nullcontext, views.append)
    found = layer_errors(teacher, {"s": student}, ids, contextlib.nullcontext)["s"]
    for view in views:
        with torch.no_grad():
            heads, _ = student.layers[view.layer].self_attn.mix(view.inputs, view.context)
        expected = (heads - view.heads).square().mean(dim=(1, 2)) / view.heads.var(correction=0)
        assert torch.allclose(found[:, view.layer], expected.double(), rtol=1e-4)


def test_window_over_the_whole_row_is_the_teacher(
    pair: Callable[..., Any], ids: torch.Tensor
) -> None:
    teacher, student = pair(mixer="lolcats", lolcats__window=24)
    found = layer_errors(teacher, {"s": student}, ids, contextlib.nullcontext)["s"]
    assert found.max() < 1e-10


def test_state_bytes(pair: Callable[..., Any]) -> None:
    teacher, student = pair()
    # 4 states of 16 features by 16 + 1 columns; 8 heads of 16 channels with 3 taps.
    assert state_bytes(student, [1], contextlib.nullcontext) == 4 * (4 * 16 * 17 + 8 * 16 * 3)
    assert state_bytes(teacher, [0, 2], contextlib.nullcontext) == 2 * 4 * 2 * 2 * 16


def test_estimate() -> None:
    found = estimate(torch.tensor([1.0, 2.0, 3.0]))
    assert f"{found:.3f}" == "2.000 ± 1.132"
    assert f"{estimate(torch.tensor([-0.5])):+.1f}" == "-0.5"


def test_plot_shows_better_as_lighter(whole: tuple[Path, Ablation], tmp_path: Path) -> None:
    dark = replace(whole[1].scored[0], layers=(1.0,) * 30)
    light = replace(whole[1].scored[0], layers=(0.0,) * 30)
    result = replace(whole[1], layers=tuple(range(30)), scored=(light, dark))
    draw_ablation(result, tmp_path / "a.png")
    image = imread(tmp_path / "a.png")[..., :3]
    middle = image[:, image.shape[1] // 2].mean(axis=1)
    upper, lower = middle[len(middle) // 3], middle[2 * len(middle) // 3]
    assert upper > lower + 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_shipped_variants_cover_what_the_defaults_rest_on() -> None:
    shipped = load_variants(overrides={"transfer.tokens": 64})
    base = shipped.base.lawcat
    assert shipped.base.transfer.tokens == 64
    others = [plan for name, plan in shipped.recipes.items() if name != BASE]
    values = [dump(plan.lawcat) for plan in (shipped.base, *others)]
    for key, expected in {
        "state_sharing": {"q_head", "kv_head"},
        "position": {"none", "rope"},
        "conv": {True, False},
        "normaliser": {True, False},
        "gate_bias_init": {0.0, 4.0, -2.0},
        "gate_bias_span": {0.0, 20.0},
        "feature_dim": {None, 64},
    }.items():
        assert {value[key] for value in values} == expected
    assert {plan.mixer for plan in others} == {"lawcat", "lolcats"}
    assert base.gate_bias_span > 0


BAD_VARIANTS = {
    "changes nothing": ("[variants.a]\ntransfer.lr = 0.01", "variant 'a' changes nothing"),
    "other tokens": ("[variants.a]\ntransfer.tokens = 9", "variant 'a' changes transfer.tokens;"),
    "called base": ("[variants.base]\nmixer = 'lolcats'", "none of them called base"),
    "none": ("[variants]", "give one or more"),
    "unknown key": ("[variants.a]\nlawcat.gait = 1", "unknown key 'gait'"),
    "not TOML": ("[variants", "cannot be read"),
}


@pytest.mark.parametrize(("table", "told"), BAD_VARIANTS.values(), ids=BAD_VARIANTS.keys())
def test_bad_variants(tmp_path: Path, table: str, told: str) -> None:
    with pytest.raises(UsageError, match=r"v\.toml") as caught:
        load_variants(write(tmp_path / "v.toml", f"{BASE_TABLE}{table}\n"))
    assert told in str(caught.value)


BAD_ARGUMENTS = {
    "layer": (["--layers", "3"], "layer 3 given; allowed: 0 to 2"),
    "rows too long": (["--length", "100000"], "give at least the 100000 of a row"),
    "same name": (["--held-out", "{held_out}", "{held_out}"], "two held-out texts are called ada"),
    "missing text": (["--held-out", "nowhere.txt"], "nowhere.txt: cannot be read"),
    "missing data": (["--data", "nowhere.txt"], "nowhere.txt"),
    "finished": (["-o", "{finished}"], "holds a finished ablation"),
    "no teacher": (["--set", "mixer=softmax"], "nothing to distil"),
}


@pytest.mark.parametrize(("flags", "told"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_one_line(
    teacher_directory: Path,
    text: Path,
    held_out: list[Path],
    whole: tuple[Path, Ablation],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    told: str,
) -> None:
    given = [str(teacher_directory), "--cpu", "--data", str(text), "--held-out", str(held_out[0])]
    given += ["--length", "32", "-o", str(tmp_path / "a")]
    code = main(given + [f.format(held_out=held_out[0], finished=whole[0]) for f in flags])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert error.startswith("ablation: error: ")
    assert told in error
    assert not (tmp_path / "a").exists()
