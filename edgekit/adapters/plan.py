"""When the projections of an adapter freeze, and in which order: one plan, many methods."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from edgekit.adapters.schedule import FreezeSchedule, Shape, steps_of
from edgekit.adapters.scores import Cadence
from edgekit.errors import UsageError

__all__ = ["PLANS", "FreezePlan", "Granularity", "Order", "Rule"]

Rule = Literal["rank", "reference"]
Granularity = Literal["projection", "pair"]
Order = Literal["score", "random", "depth"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FreezePlan:
    """What a `FreezeController` does.

    Attributes:
        at_start: patterns (`fnmatch`) of projection names that are frozen before the first step.
        t_init: span in which everything is trained; see `schedule.steps_of`.
        t_final: span at the end in which no projection is.
        schedule: shape of the way between them; `never` leaves the rest trained.
        power: of that shape.
        interval: steps between decisions, delta t.
        rule: `rank` freezes the lowest scores until the schedule is met; `reference` all whose
            score is below a quantile of the elements, as the authors' code does.
        order: `score`, or for comparison `random`, or by `depth`, the first layers first.
        granularity: `pair` freezes both projections of a module at once, by their mean score.
        beta1: of the scores.
        beta2: of the scores.
        cadence: of the scores.
        seed: of the order `random`.
    """

    at_start: tuple[str, ...] = ()
    t_init: float | str = 0.1
    t_final: float | str = 0.4
    schedule: Shape = "cubic"
    power: float = 3.0
    interval: int = 10
    rule: Rule = "rank"
    order: Order = "score"
    granularity: Granularity = "projection"
    beta1: float = 0.85
    beta2: float = 0.95
    cadence: Cadence = "step"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what does not depend on the length of training.

        Raises:
            UsageError: naming what is outside.
        """
        choices = {"rule": Rule, "order": Order, "granularity": Granularity, "cadence": Cadence}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                known = ", ".join(get_args(allowed))
                raise UsageError(f"{name} {getattr(self, name)!r} given; allowed: {known}")
        if self.interval < 1:
            raise UsageError(f"interval {self.interval} given; allowed: 1 or more steps")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 0 up to, not 1")

    def freezes_at_start(self, name: str) -> bool:
        """Whether the projection called `name` is never trained."""
        return any(fnmatchcase(name, pattern) for pattern in self.at_start)

    def over(self, total: int, per_epoch: int | None = None) -> FreezeSchedule:
        """The schedule of a training of `total` steps.

        Raises:
            UsageError: if the spans do not fit into it.
        """
        return FreezeSchedule(
            total=total,
            start=steps_of(self.t_init, total=total, per_epoch=per_epoch),
            final=steps_of(self.t_final, total=total, per_epoch=per_epoch),
            shape=self.schedule,
            power=self.power,
        )


ALWAYS = FreezePlan(at_start=("*",), schedule="never")
PLANS = {
    # AFLoRA: everything, by score.
    "aflora": FreezePlan(),
    # FFA-LoRA (arXiv 2403.12313): the random A never, B always.
    "ffa": FreezePlan(at_start=("*_A",), schedule="never"),
    # LaMDA (arXiv 2406.12832): the first projection never, the second ever less in early training.
    "lamda": FreezePlan(at_start=("*_A",), t_init=0.0, t_final=0.7),
    # As in VeRA (arXiv 2310.11454): vectors only.
    "always": ALWAYS,
    "none": FreezePlan(schedule="never"),
}
