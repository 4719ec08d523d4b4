"""How much of a model is kept at which step: the curve of density, and the steps at which masks may change.

Takes numbers, gives numbers and patterns. Knows no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from sparsecomp.errors import MethodError
from sparsecomp.patterns import NM, VNM, Block, Pattern, Unstructured

CURVES = ("constant", "linear", "cubic", "exponential", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The share of the way from dense to the goal, by optimizer step, and when masks may change.

    ``curve`` is "constant" (the goal from the first step on), "linear", "cubic" (Zhu and Gupta 2017: the share of
    weights still to be dropped falls with the third power), "exponential" (the density falls by the same factor each
    time) or "cosine". The first ``warm_up`` steps are dense. Masks may change after the last of them, then after every
    ``every`` steps, and after the last step before the ``cool_down``, the steps at the end in which masks stay. So
    ``steps = k * every`` without warm-up and cool-down makes k changes, each after as many steps.

    Raises MethodError for numbers that make no schedule.
    """

    curve: str = "constant"
    warm_up: int = 0
    cool_down: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        if self.curve not in CURVES:
            raise MethodError(f'a schedule "{self.curve}" is not known; choose one of {", ".join(CURVES)}')
        for name in ("warm_up", "cool_down", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise MethodError(f"{name}={value!r} is not allowed; give a whole number of optimizer steps")
        for name in ("warm_up", "cool_down"):
            if getattr(self, name) < 0:
                raise MethodError(f"{name}={getattr(self, name)} is below zero; give a number of optimizer steps")
        if self.every < 1:
            raise MethodError(f"every={self.every} would never change a mask; give 1 or more optimizer steps")

    def check(self, steps: int) -> None:
        """Raises MethodError if nothing is left of ``steps`` between warm-up and cool-down."""
        if self.warm_up + self.cool_down >= steps:
            raise MethodError(
                f"warm_up={self.warm_up} and cool_down={self.cool_down} leave none of {steps} steps in which masks "
                "could change; shorten them, or train longer"
            )

    def last(self, steps: int) -> int:
        """The last step at which masks may change."""
        return steps - self.cool_down

    def acts(self, step: int, steps: int) -> bool:
        """Whether masks may change after ``step`` of 1 to ``steps``."""
        last = self.last(steps)
        return max(1, self.warm_up) <= step <= last and (step == last or (step - self.warm_up) % self.every == 0)

    def density(self, step: int, steps: int, goal: float) -> float:
        """The density asked for after ``step`` of 0 to ``steps``: that of the curve where masks last could change.

        It is 1.0 before the warm-up has ended, falls at the steps that ``acts`` names and at no other, and is exactly
        ``goal`` from the last of them on.
        """
        if step < self.warm_up:
            return 1.0
        last = self.last(steps)
        if step >= last or self.curve == "constant":
            return goal
        acted = step - (step - self.warm_up) % self.every
        share = (acted - self.warm_up) / (last - self.warm_up)
        if self.curve == "linear":
            return 1.0 + (goal - 1.0) * share
        if self.curve == "cubic":
            return goal + (1.0 - goal) * (1.0 - share) ** 3
        if self.curve == "exponential":
            return float(goal**share)
        return goal + (1.0 - goal) * 0.5 * (1.0 + math.cos(math.pi * share))


@lru_cache(maxsize=256)
def changes(schedule: Schedule, steps: int, goal: Pattern) -> tuple[int, ...]:
    """The steps, in order, after which the pattern asked for on the way to ``goal`` is another than before.

    A constant curve without warm-up asks for ``goal`` from step 0 on and has no such step.
    """
    found = []
    before = pattern_at(goal, schedule.density(0, steps, goal.density))
    acting = {*range(schedule.warm_up, schedule.last(steps), schedule.every), schedule.last(steps)}
    for step in sorted(acting):
        now = pattern_at(goal, schedule.density(step, steps, goal.density))
        if now != before:
            found.append(step)
        before = now
    return tuple(found)


def pattern_at(goal: Pattern, density: float) -> Pattern | None:
    """The pattern on the way to ``goal`` nearest to ``density``; None while all weights are kept.

    N:M goes from M:M to the goal one N at a time, and reaches it before the density does, so that the goal itself is
    trained as well. V:N:M has no patterns on its way and starts at once.
    """
    if density >= 1.0 and goal.density < 1.0:
        return None
    match goal:
        case NM():
            n = min(goal.m, max(goal.n, round(density * goal.m)))
            return None if n == goal.m and goal.n < goal.m else replace(goal, n=n)
        case VNM():
            return goal
        case Block() | Unstructured():
            return replace(goal, keep=max(goal.keep, density))
