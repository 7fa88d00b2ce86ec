"""Which layers deserve softmax: the damaged one first, figures as computed the long way."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from edgekit.distill.choice_plot import draw_choice
from edgekit.distill.layer_choice import BLOCK_TOKENS, Choice, pick_layers
from edgekit.distill.picker import main
from edgekit.errors import UsageError
from edgekit.models.decoder import Decoder
from edgekit.testing import write_tiny_student

Pair = Callable[..., tuple[Decoder, Decoder]]


def pick(teacher: Decoder, student: Decoder, ids: torch.Tensor, **options: Any) -> Choice:
    return pick_layers(teacher, student, ids, contextlib.nullcontext, **options)


def damage(student: Decoder, layer: int, amount: float = 1.0) -> None:
    """Wrong values in one layer; the tensor is made anew, since the teacher shares the old one."""
    attention = student.layers[layer].self_attn
    wrong = attention.v_proj.weight * (1 - 2 * amount)
    attention.v_proj.weight = torch.nn.Parameter(wrong, requires_grad=False)


@torch.no_grad()
def divergence(
    pair: Pair, teacher: Decoder, ids: torch.Tensor, softmax_layers: Sequence[int], **options: Any
) -> torch.Tensor:
    """KL per row of a hybrid that was built as one."""
    _, hybrid = pair(softmax_layers=list(softmax_layers), **options)
    log_p, log_q = (model(ids)[0].log_softmax(dim=-1) for model in (hybrid, teacher))
    per_token: torch.Tensor = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    return per_token.mean(dim=-1)


@pytest.mark.parametrize("greedy", [False, True], ids=["ranked", "greedy"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_damaged_layer_comes_first(pair: Pair, ids: torch.Tensor, layer: int, greedy: bool) -> None:
    teacher, student = pair(mixer="lolcats", lolcats__window=24)  # all in the window: the teacher
    damage(student, layer)
    choice = pick(teacher, student, ids, keep=1, greedy=greedy)
    assert choice.kl > 0.01
    assert choice.ranking[0].layer == choice.steps[0].layer == layer
    assert abs(choice.ranking[0].kl) < 1e-5
    assert choice.ranking[0].gain.value == pytest.approx(choice.kl, rel=1e-3)
    assert choice.softmax_layers == (layer,)


def test_figures_are_those_of_hybrids_built_as_such(pair: Pair) -> None:
    ids = torch.randint(3, 320, (7, 400), generator=torch.Generator().manual_seed(6))
    assert ids.numel() > BLOCK_TOKENS  # several blocks
    teacher, student = pair()
    choice = pick(teacher, student, ids, keep=3)
    before = divergence(pair, teacher, ids, ())
    assert choice.kl == pytest.approx(before.mean().item(), rel=1e-4)
    for restored in choice.ranking[1:]:
        after = divergence(pair, teacher, ids, [restored.layer])
        assert restored.kl == pytest.approx(after.mean().item(), rel=1e-4)
        assert restored.gain.value == pytest.approx((before - after).mean().item(), rel=1e-3)
        spread = 1.96 * (before - after).double().std().item() / 7**0.5
        assert restored.gain.spread == pytest.approx(spread, rel=1e-2)
    assert [r.kl for r in choice.ranking] == sorted(r.kl for r in choice.ranking)
    assert [s.layer for s in choice.steps] == [r.layer for r in choice.ranking]
    both = [step.layer for step in choice.steps[:2]]
    expected = divergence(pair, teacher, ids, both).mean().item()
    assert choice.steps[1].kl == pytest.approx(expected, rel=1e-4)
    assert abs(choice.steps[2].kl) < 1e-5  # every layer given back: the teacher


def test_greedy_takes_the_best_given_those_before(pair: Pair, ids: torch.Tensor) -> None:
    teacher, student = pair()
    choice = pick(teacher, student, ids, keep=2, greedy=True)
    first = choice.ranking[0].layer
    assert choice.steps[0] == choice.ranking[0]
    others = {
        layer: divergence(pair, teacher, ids, [first, layer]).mean().item()
        for layer in range(3)
        if layer != first
    }
    best = min(others, key=lambda layer: others[layer])
    assert choice.steps[1].layer == best
    assert choice.steps[1].kl == pytest.approx(others[best], rel=1e-4)
    gained = choice.steps[0].kl - choice.steps[1].kl
    assert choice.steps[1].gain.value == pytest.approx(gained, rel=1e-3)


@pytest.mark.parametrize("greedy", [False, True], ids=["ranked", "greedy"])
def test_layers_that_are_softmax_stay(pair: Pair, ids: torch.Tensor, greedy: bool) -> None:
    teacher, student = pair(softmax_layers=[1])
    choice = pick(teacher, student, ids, keep=1, greedy=greedy)
    assert {restored.layer for restored in choice.ranking} == {0, 2}
    assert choice.softmax_layers == tuple(sorted((1, choice.steps[0].layer)))


def test_models_are_left_as_they_were(pair: Pair, ids: torch.Tensor) -> None:
    teacher, student = pair()
    before = [student(ids)[0], teacher(ids)[0]]
    pick(teacher, student, ids, keep=2, greedy=True)
    assert all(
        torch.equal(a, model(ids)[0]) for a, model in zip(before, (student, teacher), strict=True)
    )


@pytest.mark.parametrize("greedy", [False, True], ids=["ranked", "greedy"])
def test_progress_counts_every_hybrid(pair: Pair, ids: torch.Tensor, greedy: bool) -> None:
    told: list[tuple[int, int]] = []
    pick(*pair(), ids, keep=3, greedy=greedy, progress=lambda _, n, of: told.append((n, of)))
    assert [n for n, _ in told] == list(range(len(told)))
    assert {of for _, of in told} == {len(told)}


@pytest.mark.parametrize("keep", [0, 4])
def test_keep_is_checked(pair: Pair, ids: torch.Tensor, keep: int) -> None:
    with pytest.raises(UsageError, match=f"keep {keep} given; allowed: 1 to 3"):
        pick(*pair(), ids, keep=keep)


def test_plot_marks_the_chosen(pair: Pair, ids: torch.Tensor, tmp_path: Path) -> None:
    chosen = torch.tensor((0xC8, 0x60, 0x1A)) / 255
    counts = []
    for keep in (1, 3):
        draw_choice(pick(*pair(), ids, keep=keep), tmp_path / "p.png")
        image = torch.from_numpy(imread(tmp_path / "p.png")[..., :3])
        counts.append(int(((image - chosen).abs().amax(dim=-1) < 0.01).sum()))
    assert 0 < counts[0] < counts[1]
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


@pytest.fixture(scope="module")
def student(teacher_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "student"
    return write_tiny_student(out, teacher_directory, ("lawcat", "softmax", "lawcat"))


def test_command(
    student: Path,
    teacher_directory: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [str(student), "--base", str(teacher_directory), "--text", str(text), "--cpu"]
    command += ["--precision", "fp32", "--tokens", "128", "--length", "64", "--keep", "1"]
    assert main([*command, "-o", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]) == 0
    table = capsys.readouterr().out
    choice = json.loads((tmp_path / "p.json").read_text())
    layers = choice["softmax_layers"]
    assert len(layers) == 2
    assert 1 in layers
    assert table.splitlines()[-1] == f"--softmax-layers {layers[0]},{layers[1]}"
    assert "on 2 rows of 64 tokens" in table
    assert (tmp_path / "p.png").stat().st_size > 0
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == choice


BAD = {
    "keep": (["--keep", "3"], "keep 3 given; allowed: 1 to 2"),
    "teacher": (["{teacher}"], "every layer is softmax"),
    "short text": (["--length", "100000"], "give at least the 100000 of a row"),
    "missing text": (["--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
    "missing folder": (["-o", "nowhere/p.json"], "there is no folder nowhere"),
}


@pytest.mark.parametrize(("flags", "told"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_one_line(
    student: Path,
    teacher_directory: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    told: str,
) -> None:
    if flags == ["{teacher}"]:
        given = [str(teacher_directory)]
    else:
        given = [str(student), "--base", str(teacher_directory), *flags]
    if "--text" not in given:
        given += ["--text", str(text)]
    assert main([*given, "--cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("picker: error: ")
    assert told in error
