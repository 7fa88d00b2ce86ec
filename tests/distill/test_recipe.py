"""Recipes: those that ship load, and a wrong one says what is wrong."""

import itertools
from pathlib import Path

import pytest

from edgekit.distill.recipe import Recipe, Transfer, Tuning, load_recipe, recipe_names
from edgekit.distill.schedule import rate_factor
from edgekit.errors import UsageError

MINIMAL = (
    'description = "d"\ntransfer = { tokens = 8, lr = 0.1 }\ntuning = { tokens = 0, lr = 0.1 }\n'
)


def test_what_ships() -> None:
    assert {"paper", "general", "passkey", "smoke"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.transfer.steps > 0
    assert recipe.tuning.steps > 0
    for stage in (recipe.transfer, recipe.tuning):
        assert stage.batch % stage.micro_batch == 0
        assert max(stage.needles.lengths) <= stage.length


def test_paper_is_the_published_setting() -> None:
    paper = load_recipe("paper")
    assert paper.transfer.weighting == "paper"
    assert (paper.transfer.lr, paper.transfer.gate_lr) == (1e-2, 1e-2)
    assert (paper.lawcat.gate_bias_init, paper.lawcat.gate_bias_span) == (0.0, 0.0)
    assert paper.lawcat.position == "none"
    assert paper.tuning.kl_weight == 0
    assert (paper.tuning.rank, paper.tuning.alpha, paper.tuning.lr) == (8, 16, 1e-4)


def test_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    recipe = load_recipe(path, {"transfer.tokens": 16, "lawcat.conv_size": 3, "seed": 4})
    assert (recipe.name, recipe.transfer.tokens, recipe.lawcat.conv_size) == ("mine", 16, 3)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"transfer.tokns": 1}, "unknown key 'tokns'"),
        ({"transfer.tokens": "many"}, "expected int"),
        ({"transfer.tokens": -1}, "tokens -1 given; allowed: 0 or more"),
        ({"transfer.batch": 0}, "batch 0 given; allowed: 1 or more"),
        ({"tuning.targets": ["head"]}, "target 'head' given; allowed: q_proj"),
        ({"tuning.ce_weight": 0.0}, "nothing to learn from"),
        ({"tuning.rank": 0}, "rank 0 given"),
        ({"transfer.weighting": "mine"}, "'mine' given; allowed: variance, paper"),
        ({"lawcat.conv_size": 1}, "conv_size 1 given"),
        ({"transfer": 3}, "expected a table"),
        ({"transfer.tokens.more": 3}, "tokens is a value, not a table"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_value(tmp_path: Path, overrides: dict[str, object], told: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    with pytest.raises(UsageError, match=told):
        load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("spec", "told"),
    [("nothing", "unknown; known: general"), ("none.toml", "cannot be read")],
)
def test_no_such_recipe(spec: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load_recipe(spec)


def test_broken_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("description =", encoding="utf-8")
    with pytest.raises(UsageError, match=r"mine\.toml"):
        load_recipe(path)


def test_rate_rises_then_falls_to_its_end() -> None:
    stage = Transfer(tokens=100 * 8 * 512, lr=1.0, warmup=0.1, final_lr=0.2)
    factors = [rate_factor(stage, step) for step in range(stage.steps)]
    assert stage.steps == 100
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert factors[-1] == pytest.approx(0.2)
    assert max(factors) == 1.0


def test_one_step_has_the_whole_rate() -> None:
    assert rate_factor(Tuning(tokens=1, lr=1.0), 0) == 1.0


def test_recipes_are_plain_data() -> None:
    from edgekit.config import dump, load

    recipe = load_recipe("general")
    assert load(Recipe, dump(recipe), where="again") == recipe
