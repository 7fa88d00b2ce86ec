"""Freezes the projections of an adapter while it is trained, by a plan.

Called once an optimiser step, after the gradients are there and before the optimiser moves:

    controller = FreezeController(model, total_steps=1000)
    ...
    loss.backward()
    controller.step(t, optimizer)
    optimizer.step(); optimizer.zero_grad()
"""

import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgekit.adapters.plan import FreezePlan
from edgekit.adapters.projections import Projection, freeze, is_frozen, projections
from edgekit.adapters.schedule import FreezeSchedule
from edgekit.adapters.scores import GradientScore
from edgekit.errors import UsageError

__all__ = ["FreezeController", "FreezeEvent"]

AT_START = -1  # the step of what was never trained


@dataclass(frozen=True, kw_only=True, slots=True)
class FreezeEvent:
    """One projection frozen.

    Attributes:
        step: from 0; -1 before the first.
        module: name in the model that was adapted.
        part: such as `aflora_A`.
        score: at that step; None where no score decided.
    """

    step: int
    module: str
    part: str
    score: float | None


class FreezeController:
    """Scores the projections of one adapter and freezes them; keeps the log.

    Attributes:
        log: every freeze, in order.
        schedule: over the steps of this training.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        adapter: str = "default",
        plan: FreezePlan | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        """Find the projections and freeze those that are never trained.

        Args:
            model: with PEFT's tuner layers in it, wrapped or injected.
            total_steps: optimiser steps of the whole training.
            adapter: name of the adapter.
            plan: None: that of the adapter's AFLoRA configuration, else `FreezePlan()`.
            steps_per_epoch: for spans in epochs.

        Raises:
            UsageError: if the adapter has no projections, or the plan does not fit the steps.
        """
        self._adapter = adapter
        self._all = projections(model, adapter)
        if not self._all:
            raise UsageError(
                f"adapter {adapter!r}: no projections in this model; give the name of a LoRA or "
                "AFLoRA adapter"
            )
        self._config: Any = getattr(model, "peft_config", {}).get(adapter)
        self.plan = _plan_of(self._config) if plan is None else plan
        self.schedule: FreezeSchedule = self.plan.over(total_steps, steps_per_epoch)
        self.log: list[FreezeEvent] = []
        for name, projection in self._all.items():
            if is_frozen(projection) or self.plan.freezes_at_start(name):
                self._freeze(projection, AT_START, None, None)
        self._scores = {name: self._score() for name in self.alive}
        self._vectors = _trained_elements(model) - sum(
            self._all[name].parameter.numel() for name in self.alive
        )
        self._count = len(self._scores)
        _attached(self._all.values())

    @property
    def alive(self) -> list[str]:
        """Names of the projections that are trained, sorted."""
        return [name for name, projection in self._all.items() if not is_frozen(projection)]

    @property
    def alive_fraction(self) -> float:
        """Of the projections that were trained at the start; 1 if there were none."""
        return len(self.alive) / self._count if self._count else 1.0

    @property
    def scores(self) -> dict[str, float]:
        """Of the projections that are trained, by name."""
        return {name: score.value for name, score in self._scores.items()}

    @property
    def nbytes(self) -> int:
        """Memory of the statistics."""
        return sum(score.nbytes for score in self._scores.values())

    def step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> list[FreezeEvent]:
        """`observe`, then `maybe_freeze`."""
        self.observe(step)
        return self.maybe_freeze(step, optimizer)

    def observe(self, step: int) -> None:
        """Count the gradients of `step`; one that is missing or not finite is left out."""
        del step
        for name, score in self._scores.items():
            gradient = self._all[name].parameter.grad
            if gradient is not None and bool(gradient.isfinite().all()):
                score.observe(gradient)

    def maybe_freeze(
        self, step: int, optimizer: torch.optim.Optimizer | None = None
    ) -> list[FreezeEvent]:
        """Freeze what the schedule asks for at `step`.

        Args:
            step: of the optimiser, from 0.
            optimizer: whose state of frozen projections is dropped; it does not move them again.

        Returns:
            What was frozen now.
        """
        before = len(self.log)
        for name in self._victims(step):
            score = self._scores.pop(name).value
            self._freeze(self._all[name], step, score, optimizer)
        return self.log[before:]

    def trainable(self) -> int:
        """Elements that are trained now, heads and vectors included."""
        return self._vectors + sum(self._all[name].parameter.numel() for name in self.alive)

    def mean_trainable(self, steps: int | None = None) -> float:
        """Mean over training of the elements trained, from the log.

        Args:
            steps: that were made; None: all of the schedule's.
        """
        total = self.schedule.total if steps is None else steps
        frozen = {f"{event.module}.{event.part}": event.step for event in self.log}
        lives = (
            (projection.parameter.numel(), frozen.get(name, total))
            for name, projection in self._all.items()
        )
        if not total:
            return float(self.trainable())
        return self._vectors + sum(n * max(min(t, total), 0) / total for n, t in lives)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs: `log` (JSON-ready) and `scores` (tensors by name)."""
        tensors = {
            f"{name}/{key}": tensor
            for name, score in self._scores.items()
            for key, tensor in score.tensors().items()
        }
        return {"log": [event_record(event) for event in self.log], "scores": tensors}

    def load_state_dict(
        self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Go on from `state_dict`: freezes what was frozen, drops its optimiser state.

        Raises:
            UsageError: if the log names a projection that is not here.
        """
        for record in state["log"]:
            event = FreezeEvent(**record)
            name = f"{event.module}.{event.part}"
            if name not in self._all:
                raise UsageError(f"freeze log: {name} is not in this model; give its own adapter")
            self._scores.pop(name, None)
            freeze(self._all[name], optimizer)
            self._remember(event)
        self.log = [FreezeEvent(**record) for record in state["log"]]
        for name, score in self._scores.items():
            kept = {
                key.removeprefix(f"{name}/"): tensor
                for key, tensor in state["scores"].items()
                if key.startswith(f"{name}/")
            }
            if kept:
                score.load(kept)

    def _score(self) -> GradientScore:
        plan = self.plan
        return GradientScore(
            beta1=plan.beta1, beta2=plan.beta2, cadence=plan.cadence, window=plan.interval
        )

    def _freeze(
        self,
        projection: Projection,
        step: int,
        score: float | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        freeze(projection, optimizer)
        event = FreezeEvent(step=step, module=projection.module, part=projection.part, score=score)
        self.log.append(event)
        self._remember(event)

    def _remember(self, event: FreezeEvent) -> None:
        """Write `event` into the adapter's configuration, which is saved with it."""
        frozen = getattr(self._config, "frozen_pms", None)
        if frozen is None or self._config is None:
            return
        parts = frozen.setdefault(event.module, [])
        if event.part not in parts:
            parts.append(event.part)
            self._config.freeze_log.append(event_record(event))

    def _victims(self, step: int) -> list[str]:
        """Names to freeze at `step`."""
        schedule = self.schedule
        if schedule.shape == "never" or step <= schedule.start or not self._scores:
            return []
        if step > schedule.end:
            return list(self._scores)
        if step % self.plan.interval:
            return []
        groups = self._groups()
        if self.plan.rule == "reference":
            below = self._quantile(1 - schedule.fraction(step))
            return [name for names, score in groups if score < below for name in names]
        left = self._count - math.floor((1 - schedule.fraction(step)) * self._count)
        victims: list[str] = []
        for names, _ in self._ordered(groups):
            if len(self._scores) - len(victims) <= left:
                break
            victims += names
        return victims

    def _groups(self) -> list[tuple[list[str], float]]:
        """Projections that freeze together with their mean score, by name."""
        scores = self.scores
        groups: dict[str, list[str]] = {}
        for name in sorted(scores):
            key = self._all[name].module if self.plan.granularity == "pair" else name
            groups.setdefault(key, []).append(name)
        return [(names, sum(scores[n] for n in names) / len(names)) for names in groups.values()]

    def _ordered(self, groups: list[tuple[list[str], float]]) -> list[tuple[list[str], float]]:
        """The first to freeze first; ties by name."""
        if self.plan.order == "random":
            order = random.Random(self.plan.seed)
            ranks = {name: order.random() for name in self._all}
            return sorted(groups, key=lambda group: ranks[group[0][0]])
        if self.plan.order == "depth":
            return sorted(groups, key=lambda group: _depth(group[0][0]))
        return sorted(groups, key=lambda group: group[1])

    def _quantile(self, part: float) -> float:
        """The value that `part` of the elements of all scores do not exceed; 0 for none."""
        elements = torch.cat([score.elements for score in self._scores.values()])
        count = int(elements.numel() * part)
        return float(elements.kthvalue(count).values) if count else 0.0


def event_record(event: FreezeEvent) -> dict[str, Any]:
    """`event` as plain data."""
    return {"step": event.step, "module": event.module, "part": event.part, "score": event.score}


def _plan_of(config: Any) -> FreezePlan:
    make = getattr(config, "freeze_plan", None)
    return FreezePlan() if make is None else make()


def _trained_elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _attached(found: Iterable[Projection]) -> None:
    """Tell the layers that somebody decides about them."""
    for projection in found:
        projection.layer.freeze_controlled = True  # type: ignore[assignment]


def _depth(name: str) -> int:
    number = re.search(r"\.(\d+)\.", f".{name}")
    return int(number[1]) if number else 0
