from pathlib import Path

import pytest

from edgekit.adapters.plan import FreezePlan
from edgekit.adapters.tune.recipe import METHODS, Recipe, load_recipe, recipe_names
from edgekit.errors import UsageError


def test_every_method_ships_with_a_recipe() -> None:
    assert set(METHODS) < set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description
        if name in METHODS:
            assert recipe.method == name
    assert len({load_recipe(method).targets for method in METHODS}) == 1  # compared on the same


def test_a_file_and_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "x"\nmethod = "aflora"\nrank = 4\n')
    recipe = load_recipe(path, {"freeze.interval": 7, "lr": 1})
    assert (recipe.name, recipe.lr) == ("mine", 1.0)
    assert recipe.plan == FreezePlan(interval=7)


def test_only_aflora_freezes_unasked() -> None:
    plans = {method: Recipe(description="", method=method, rank=2).plan for method in METHODS}
    assert plans == {"aflora": FreezePlan(), "lora": None, "vera": None}


@pytest.mark.parametrize(
    "target",
    ["conv_q", "conv_k", "gate_down", "gate_up", "feature_map", "input_layernorm", "embed_tokens",
     "lm_head", "norm"],
)  # fmt: skip
def test_what_takes_no_adapter(target: str) -> None:
    with pytest.raises(UsageError, match=f"target '{target}' given; allowed: q_proj, k_proj"):
        load_recipe("lora", {"targets": ["q_proj", target]})


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("lora", {"targets": []}, "target none given"),
        ("lora", {"rank": 0}, "rank 0 given; allowed: 1 or more"),
        ("lora", {"lr": -1.0}, "lr -1.0 given; allowed: 0 or more"),
        ("lora", {"steps": 0, "epochs": 0}, "steps and epochs are both 0"),
        (
            "lora",
            {"batch": 6, "micro_batch": 4},
            "micro_batch 4 given; allowed: a divisor of batch",
        ),
        ("lora", {"method": "dora"}, "method"),
        ("vera", {"alpha": 2}, "alpha given for vera"),
        ("vera", {"freeze.interval": 2}, "freeze given for vera"),
        ("aflora", {"freeze.rule": "mood"}, "rule"),
        ("aflora", {"freezing.rule": "rank"}, "unknown key 'freezing'"),
        ("aflora", {"lr.peak": 1}, "lr is a value, not a table"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_allowed(method: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(method, overrides)


def test_unknown_recipes() -> None:
    with pytest.raises(UsageError, match="'magic' is unknown; known: aflora, gsm8k, lora"):
        load_recipe("magic")
