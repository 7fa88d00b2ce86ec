"""The search for a rate."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.adapters.tune.manifest import Trial
from edgekit.adapters.tune.recipe import Recipe
from edgekit.adapters.tune.run import Settings, tune
from edgekit.adapters.tune.search import at_rate, best_of, total_steps
from edgekit.errors import TrainingError, UsageError
from edgekit.journal import Journal

Small = Callable[..., Recipe]
RATES = (1e-6, 1e30, 2e-2)


def settings(**options: float) -> Settings:
    return Settings(cpu=True, precision="fp32", lr_search=RATES, **options)


def test_the_best_rate_is_taken_and_all_are_told(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path
) -> None:
    plan = small("lora", steps=10, search_steps=5, vector_lr=0.1, warmup=0.0)
    report = tune(checkpoint, tmp_path / "a", plan, data=[examples], settings=settings())
    assert report.manifest is not None
    low, broken, good = report.manifest.search
    assert (low.lr, low.steps, broken.held_out_loss) == (1e-6, 5, None)
    assert good.held_out_loss is not None
    assert low.held_out_loss is not None
    assert good.held_out_loss < low.held_out_loss
    assert report.manifest.recipe["lr"] == 2e-2
    assert report.manifest.steps == 10
    (kept,), (back,) = report.manifest.data, report.manifest.held_out  # of the same file
    assert kept["sha256"] == back["sha256"]
    assert kept["rows"] + back["rows"] == 30
    assert back["rows"] > 0


def test_it_stops_in_time_and_goes_on(
    checkpoint: Path, examples: Path, small: Small, tmp_path: Path
) -> None:
    plan, out = small("vera", steps=4), tmp_path / "a"
    report = tune(checkpoint, out, plan, data=[examples], settings=settings(stop_after=0.0))
    assert not report.finished
    assert not (tmp_path / "a.run" / "search").exists()
    # A trial that was made is not made again: one that nobody could beat wins.
    journal = tmp_path / "a.run" / "search.jsonl"
    assert journal.read_text().count("\n") == 1  # the settings
    with journal.open("a") as file:
        file.write('{"lr": 1e-06, "steps": 1, "held_out_loss": 0.0}\n')
    report = tune(checkpoint, out, plan, data=[examples], settings=settings(), resume=True)
    assert report.manifest is not None
    assert report.manifest.recipe["lr"] == 1e-6


@pytest.mark.parametrize(
    "rates", [(1e-3, 1e-2), (1e-3, 1e-3, 1e-2), (1e-3, 0.0, 1e-2), (1.0, 2.0, float("nan"))]
)
def test_too_few_rates(rates: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="allowed: 3 or more different ones above 0"):
        Settings(lr_search=rates)


def test_the_choice() -> None:
    trials = [Trial(lr=r, steps=1, held_out_loss=x) for r, x in ((1, 0.5), (2, None), (3, 0.25))]
    assert best_of(tuple(trials)) == 3
    with pytest.raises(TrainingError, match="no rate of the search gave a finite loss"):
        best_of((trials[1],))


def test_steps_and_rates(small: Small) -> None:
    assert total_steps(small("lora", steps=7), 100) == 7
    assert total_steps(small("lora", steps=0, epochs=1.5), 10) == 5  # batches of 4, 4 and 2
    assert at_rate(small("lora", vector_lr=0.04), 1e-2).vector_lr == pytest.approx(0.02)


def test_the_journal_is_that_of_the_settings(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"steps": 1})
    with pytest.raises(UsageError, match="begun with other settings"):
        Journal(tmp_path / "j", {"steps": 2})
