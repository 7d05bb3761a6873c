"""How far a run has come, and the learning rate that belongs there."""

import math
from dataclasses import dataclass

from sightline.training.settings import Settings


def rate(settings: Settings, progress: float) -> float:
    """The learning rate as a share of its height at `progress`, 0 to 1: a linear rise, then the chosen fall."""
    warmup, floor = settings.warmup, settings.min_lr
    if progress < warmup:
        return progress / warmup
    after = (progress - warmup) / (1 - warmup)
    if settings.sched == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * after))
    if settings.sched == "linear":
        return floor + (1 - floor) * (1 - after)
    if settings.sched == "inverse_sqrt":
        # Falls as 1/√progress from the end of the warm-up, which therefore has to have a length.
        return max(floor, math.sqrt(max(warmup, 1e-2) / max(progress, warmup, 1e-2)))
    return 1.0


def decay(settings: Settings, progress: float) -> float:
    """The weight decay at `progress`, 0 to 1: along half a cosine to its value at the end, where there is one."""
    start, end = settings.weight_decay, settings.weight_decay_end
    return start if end is None else end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


UNMEASURED = 10**9
"""The steps of a run by the clock before its pace is known."""


@dataclass(frozen=True)
class Plan:
    """How many steps a run has, and how far each stands along the schedule.

    A run by the clock is measured as it goes and planned anew: from `step`, where it had come to `progress`, the rest
    of the schedule is spread evenly over the steps up to `total`. The plan is part of every checkpoint, so that a
    resumed run follows the same schedule.
    """

    total: int
    step: int = 0
    progress: float = 0.0

    def at(self, step: int) -> float:
        """Progress in [0, 1) at the start of a step."""
        return self.progress + (1 - self.progress) * (step - self.step) / max(self.total - self.step, 1)

    def replan(self, step: int, left: float, pace: float) -> "Plan":
        """The plan from `step` on, for `left` seconds at `pace` seconds a step."""
        return Plan(step + max(int(left / pace), 1), step, self.at(step))
