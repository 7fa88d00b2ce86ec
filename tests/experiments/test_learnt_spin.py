"""SPIN that is learnt: what the student is shown, that it learns it, and the command."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.distill.stage import TorchBatch
from edgekit.distill.teaching import View, show_layers
from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.__main__ import main as train_glyphs
from edgekit.eval.glyphs.lawcat import LawcatModel, text_tensors
from edgekit.eval.glyphs.methods import Method, turned_down
from edgekit.eval.glyphs.model import Lesson, Model, new_model
from edgekit.experiments.learnt_spin import main
from edgekit.experiments.spin_lessons import Distilling, captions, distilled, teacher_decoder
from edgekit.models.spin import SpinConfig
from edgekit.testing import TOLERANCE, assert_close

STRONG = SpinConfig(suppress=5, alpha=0.0)


def lesson(count: int = 3) -> Lesson:
    return Lesson.drawn(np.random.default_rng(5), count, pictures=True)


def batch(llava: Model, given: dict[str, torch.Tensor]) -> TorchBatch:
    """What a student with the tensors of `llava` is given."""
    model, ids = LawcatModel(llava), given["input_ids"]
    model.text.load_state_dict(text_tensors(llava), strict=False)
    with torch.no_grad():
        seen = model.embedded(ids, given["pixel_values"])
    return TorchBatch(ids, torch.full_like(ids, -100), None, seen, ids == world.IMAGE)


@torch.no_grad()
def test_the_teacher_that_shows_its_heads_is_the_model_with_spin() -> None:
    llava, given = new_model(3).eval(), lesson().given
    rows = batch(llava, given)
    with turned_down(llava, Method(spin=STRONG)):
        expected = llava(**given).logits
    logits, _ = teacher_decoder(llava, STRONG)(rows.given, image=rows.image)
    assert_close("logits", expected, logits, ratio=TOLERANCE["float32"])
    assert not torch.allclose(llava(**given).logits, expected, atol=1e-2)


def test_heads_that_are_turned_down_are_shown_so() -> None:
    llava, shown = new_model(3).eval(), {}

    def heads(spin: SpinConfig | None) -> torch.Tensor:
        def visit(view: View) -> None:
            shown[view.layer] = view.heads

        rows = batch(llava, lesson().given)
        show_layers(teacher_decoder(llava, spin), [0, 1, 2], rows, contextlib.nullcontext, visit)
        return shown[0].unflatten(-1, (8, -1))

    plain, spun = heads(None), heads(STRONG)
    silent = (spun == 0).all(dim=-1)
    text = torch.arange(plain.shape[1]) > world.PATCHES  # BOS is the first that sees the picture
    assert (silent[:, text].sum(dim=-1) == STRONG.suppress).all()
    assert_close("heads", plain[~silent], spun[~silent], ratio=TOLERANCE["float32"])


def test_rows_keep_their_pictures() -> None:
    whole = batch(new_model(3), lesson().given)
    part = whole.rows(1, 3)
    assert part.embeddings is not None
    assert part.image is not None
    assert whole.embeddings is not None
    assert whole.image is not None
    assert torch.equal(part.embeddings, whole.embeddings[1:3])
    assert torch.equal(part.image, whole.image[1:3])
    assert part.given is part.embeddings


@pytest.mark.parametrize("mixer", ["softmax", "lawcat"])
def test_a_student_learns_and_the_teacher_stays(mixer: str) -> None:
    llava = new_model(3).eval()
    before = {name: tensor.clone() for name, tensor in llava.state_dict().items()}
    settings = Distilling(transfer_steps=100, tuning_steps=100, batch=8)

    def distance(steps: Distilling) -> float:
        student = distilled(llava, mixer, STRONG, steps)  # type: ignore[arg-type]
        with torch.no_grad():
            with turned_down(llava, Method(spin=STRONG)):
                expected = captions(llava, lesson(32))
            found = captions(student, lesson(32))
        divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum")
        return float(divergence)

    assert distance(settings) < 0.7 * distance(Distilling(transfer_steps=1, tuning_steps=0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in llava.state_dict().items())


def test_the_command_measures_six_cells_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    glyphs, out = tmp_path / "glyphs", tmp_path / "learnt"
    assert main([str(glyphs), "-o", str(out), "--smoke"]) == 2
    assert "nothing measured in it" in capsys.readouterr().err
    few = ["--seeds", "0", "--scenes", "4", "--smoke"]
    assert train_glyphs(["-o", str(glyphs), *few]) == 0
    assert main([str(glyphs), "-o", str(out), "--smoke"]) == 0
    table = (out / "table.md").read_text()
    assert [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][2:] == [
        [f" {model} ", f" {where} "]
        for model in ("softmax", "LAWCAT")
        for where in ("none", "at run time", "learnt")
    ]
    kept = (out / "seed-0.json").read_bytes()
    assert main([str(glyphs), "-o", str(out), "--smoke"]) == 0
    assert (out / "seed-0.json").read_bytes() == kept
    changed = json.loads(kept)
    changed["settings"]["distilling"]["seed"] = 9
    (out / "seed-0.json").write_text(json.dumps(changed))
    assert main([str(glyphs), "-o", str(out), "--smoke"]) == 2
    assert "is of other settings; give another folder" in capsys.readouterr().err
