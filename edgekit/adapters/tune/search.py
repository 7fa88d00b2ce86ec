"""The learning rate: shorter trainings side by side, judged on what is held out."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace

from edgekit.adapters.tune.manifest import Trial
from edgekit.adapters.tune.model import Tuned
from edgekit.adapters.tune.recipe import Recipe
from edgekit.adapters.tune.recorder import Clock
from edgekit.adapters.tune.rows import Examples
from edgekit.adapters.tune.training import Training, held_out_loss, train
from edgekit.config import dump
from edgekit.errors import TrainingError, UsageError
from edgekit.journal import Journal

__all__ = ["at_rate", "best_of", "check_rates", "search", "total_steps"]

JOURNAL, SCRATCH = "search.jsonl", "search"
FEWEST = 3


def search(
    fresh: Callable[[], Tuned],
    examples: Examples,
    plan: Recipe,
    rates: tuple[float, ...],
    training: Training,
) -> tuple[Trial, ...] | None:
    """Try each rate for `plan.search_steps` steps; what was tried before is not tried again.

    The schedule of the rate and of freezing is pressed into those steps, and `vector_lr` keeps its
    ratio to `lr`. A rate whose loss is not finite counts as the worst.

    Args:
        fresh: makes the model with an adapter that was not trained.
        examples: with some held out.
        plan: the recipe.
        rates: three or more.
        training: of the run; its folder keeps the journal.

    Returns:
        A trial for each rate; None if the clock ended the search.

    Raises:
        UsageError: for rates that `check_rates` refuses, or nothing held out.
    """
    check_rates(rates)
    if examples.held_out is None:
        raise UsageError("a search needs held-out examples; give --held-out FILE.jsonl")
    steps = plan.search_steps or math.ceil(total_steps(plan, len(examples.train)) / 4)
    settings = {"recipe": dump(plan), "rates": rates, "steps": steps}
    journal = Journal(training.folder / JOURNAL, settings)
    done = {record["lr"] for record in journal.records}
    for rate in (rate for rate in dict.fromkeys(rates) if rate not in done):
        if training.clock.over:
            return None
        trial = _trial(fresh(), examples, replace(at_rate(plan, rate), steps=steps), training)
        if trial is None:
            return None
        journal.append(dump(trial))
    found = {record["lr"]: Trial(**record) for record in journal.records}
    return tuple(found[rate] for rate in dict.fromkeys(rates))


def check_rates(rates: tuple[float, ...]) -> None:
    """Refuse what is no search.

    Raises:
        UsageError: for fewer than three different rates, or one that is not above 0.
    """
    if len(set(rates)) < FEWEST or not all(0 < rate < math.inf for rate in rates):
        told = ", ".join(f"{rate:g}" for rate in rates) or "none"
        raise UsageError(f"rates {told} given; allowed: {FEWEST} or more different ones above 0")


def best_of(trials: tuple[Trial, ...]) -> float:
    """The rate with the smallest held-out loss.

    Raises:
        TrainingError: if no rate gave a finite one.
    """
    finite = [(t.held_out_loss, t.lr) for t in trials if t.held_out_loss is not None]
    if not finite:
        raise TrainingError("no rate of the search gave a finite loss; give smaller ones")
    return min(finite)[1]


def total_steps(plan: Recipe, rows: int) -> int:
    """Optimiser steps of the whole training."""
    return plan.steps or math.ceil(plan.epochs * math.ceil(rows / plan.batch))


def at_rate(plan: Recipe, rate: float) -> Recipe:
    """The recipe at another rate; `vector_lr` keeps its ratio to `lr`."""
    vectors = None if plan.vector_lr is None else plan.vector_lr * rate / plan.lr
    return replace(plan, lr=rate, vector_lr=vectors)


def _trial(model: Tuned, examples: Examples, plan: Recipe, training: Training) -> Trial | None:
    folder = training.folder / SCRATCH
    without_checkpoints = replace(
        training,
        folder=folder,
        name=f"trying lr {plan.lr:g}",
        clock=Clock(stop_at=training.clock.stop_at),
        checkpoint=None,
    )
    loss: float | None = None
    try:
        if not train(model, examples.train, plan, without_checkpoints).finished:
            return None
        assert examples.held_out is not None
        found = held_out_loss(model, examples.held_out, plan.micro_batch)
        loss = found if math.isfinite(found) else None
    except TrainingError:
        pass  # the rate is too high, which is what was to be found out
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Trial(lr=plan.lr, steps=plan.steps, held_out_loss=loss)
