"""The learning rate as a pure function of the step: linear warm-up, then a cosine."""

import math

from edgekit.distill.recipe import Stage

__all__ = ["rate_factor"]


def rate_factor(stage: Stage, step: int) -> float:
    """The share of the peak rate at `step`, counted from 0; `final_lr` of it at the last one."""
    rising = max(math.ceil(stage.warmup * stage.steps), 1)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising + 1) / max(stage.steps - rising, 1)
    return stage.final_lr + (1 - stage.final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
