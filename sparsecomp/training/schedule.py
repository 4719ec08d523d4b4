"""How much of a model is kept at which step: the curve of density, and the steps at which masks may change.

Takes numbers, gives numbers and patterns. Knows no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sparsecomp.errors import MethodError
from sparsecomp.patterns import NM, VNM, Block, Pattern, Unstructured

CURVES = ("constant", "linear", "cubic", "exponential", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The share of the way from dense to the goal, by optimizer step, and when masks may change.

    ``curve`` is "constant" (the goal from the first step on), "linear", "cubic" (Zhu and Gupta 2017: the share of
    weights still to be dropped falls with the third power), "exponential" (the density falls by the same factor each
    step) or "cosine". Nothing is dropped in the first ``warm_up`` steps; in the last ``cool_down`` steps masks do not
    change. Between them masks change every ``every`` steps.

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
        """Whether masks may change after ``step`` of 1 to ``steps``: every so often, and at the last one allowed."""
        last = self.last(steps)
        if not self.warm_up < step <= last:
            return False
        return step == last or (step - self.warm_up - 1) % self.every == 0

    def density(self, step: int, steps: int, goal: float) -> float:
        """The density asked for after ``step`` of 0 to ``steps``, 1.0 before the warm-up has ended."""
        if step < self.warm_up:
            return 1.0
        share = min(1.0, (step - self.warm_up) / (self.last(steps) - self.warm_up))
        if self.curve == "linear":
            return 1.0 + (goal - 1.0) * share
        if self.curve == "cubic":
            return goal + (1.0 - goal) * (1.0 - share) ** 3
        if self.curve == "exponential":
            return float(goal**share)
        if self.curve == "cosine":
            return goal + (1.0 - goal) * 0.5 * (1.0 + math.cos(math.pi * share))
        return goal


def pattern_at(goal: Pattern, density: float) -> Pattern | None:
    """The pattern on the way to ``goal`` that keeps at least ``density``; None while all weights are kept.

    N:M goes from M:M to the goal one N at a time. V:N:M has no patterns on its way and starts at once.
    """
    if density >= 1.0 and goal.density < 1.0:
        return None
    match goal:
        case NM():
            n = min(goal.m, max(goal.n, math.ceil(density * goal.m - 1e-9)))
            return None if n == goal.m and goal.n < goal.m else replace(goal, n=n)
        case VNM():
            return goal
        case Block() | Unstructured():
            return replace(goal, keep=max(goal.keep, density))
