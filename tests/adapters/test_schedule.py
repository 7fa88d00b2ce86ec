"""What part is trained at each step: the values of AFLoRA's recipes."""

import pytest

from edgekit.adapters.plan import FreezePlan
from edgekit.adapters.schedule import FreezeSchedule, steps_of
from edgekit.errors import UsageError


@pytest.mark.parametrize(
    ("start", "final", "shape", "power", "mean"),
    [
        (0.05, 0.70, "cubic", 3.0, 0.1125),  # GLUE, 20 epochs
        (0.10, 0.70, "cubic", 3.0, 0.150),  # GLUE, 10 epochs
        (0.30, 0.30, "late", 2.0, 0.567),  # GSM8k
        (0.10, 0.40, "cubic", 3.0, 0.225),  # the default
    ],
)
def test_mean_of_the_published_schedules(
    start: float, final: float, shape: str, power: float, mean: float
) -> None:
    plan = FreezePlan(t_init=start, t_final=final, schedule=shape, power=power)
    assert plan.over(10_000).mean() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("shape", ["cubic", "late", "step"])
def test_from_everything_to_nothing_without_a_rise(shape: str) -> None:
    schedule = FreezeSchedule(total=97, start=13, final=31, shape=shape)
    values = [schedule.fraction(step) for step in range(97)]
    assert values[13] == 1.0
    assert values[schedule.end] == 0.0
    assert values == sorted(values, reverse=True)
    assert schedule.mean() == pytest.approx(sum(values) / 97)


def test_never_and_at_once() -> None:
    never = FreezeSchedule(total=10, start=0, final=0, shape="never")
    assert {never.fraction(step) for step in range(10)} == {1.0}
    step = FreezeSchedule(total=10, start=4, final=0, shape="step")
    assert [step.fraction(t) for t in range(10)] == [1.0] * 5 + [0.0] * 5


@pytest.mark.parametrize(
    ("span", "steps"), [(0, 0), (0.25, 50), (1, 1), (30, 30), ("2ep", 80), ("0.5ep", 20)]
)
def test_spans(span: float | str, steps: int) -> None:
    assert steps_of(span, total=200, per_epoch=40) == steps


@pytest.mark.parametrize("span", [-1, 1.5, "2 epochs", "ep"])
def test_spans_that_mean_nothing(span: float | str) -> None:
    with pytest.raises(UsageError, match="allowed:"):
        steps_of(span, total=200, per_epoch=40)


def test_epochs_of_unknown_length() -> None:
    with pytest.raises(UsageError, match="length of an epoch is not known"):
        steps_of("2ep", total=200, per_epoch=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 60, "final": 50}, "together no more than these"),
        ({"start": -1}, "0 or more each"),
        ({"shape": "linear"}, "allowed: cubic, late, step, never"),
        ({"power": 0.0}, "power 0.0 given"),
    ],
)
def test_schedules_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FreezeSchedule(**{"total": 100, "start": 10, "final": 10, **changes})
