"""What a rule of sparse training is: it sees gradients and weights, and says what the masks are.

A rule is a frozen dataclass of its settings and registers its name. What it learns lies in ``TrainedLayer.state`` and
in ``Progress.extra``, from where it is saved and resumed.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sparsecomp.errors import MethodError
from sparsecomp.patterns import Pattern
from sparsecomp.training.choice import Scope, choose, choose_signed
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.schedule import CURVES, Schedule


@dataclass(eq=False)
class Progress:
    """Where a training stands: what a rule may read, and write its choices with.

    ``step`` counts the optimizer's steps that are done, of ``steps``. ``extra`` holds what a rule keeps beside the
    layers' tensors: numbers and tensors by name, saved with the rest. ``generator`` is the rule's own source of random
    numbers, on the CPU.
    """

    layers: Sequence[TrainedLayer]
    steps: int
    schedule: Schedule
    scope: Scope
    generator: torch.Generator
    attached: torch.optim.Optimizer | None = None
    step: int = 0
    extra: dict[str, float | Tensor] = field(default_factory=dict)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that steps on the weights; there is one at every step."""
        assert self.attached is not None
        return self.attached

    def densities(self) -> dict[str, float]:
        """The density that the schedule asks of each layer now."""
        return {each.name: self.schedule.density(self.step, self.steps, each.pattern.density) for each in self.layers}

    def choose(self, scores: Mapping[str, Tensor]) -> None:
        """Give every layer the mask that keeps the largest of these scores at the density of now.

        ``scores`` are by layer name, as stored, finite and >= 0 (``choice.from_saliency`` makes them of any number).
        """
        self.set_masks(choose(self.layers, scores, self.densities(), self.scope))

    def keep_largest(self) -> None:
        """Give every layer the mask of its largest weights at the density of now."""
        self.choose({each.name: each.weight.abs() for each in self.layers})

    def choose_signed(self, saliency: Mapping[str, Tensor]) -> None:
        """As ``choose`` for saliencies of any sign; for a block pattern there is one for each block [grid]."""
        self.set_masks(choose_signed(self.layers, saliency, self.densities(), self.scope))

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Give every layer its mask, as stored, by layer name."""
        for each in self.layers:
            each.set_mask(masks[each.name])

    def group(self, layer: TrainedLayer) -> dict[str, Any]:
        """The optimizer's parameter group that holds the layer's weight."""
        for group in self.optimizer.param_groups:
            if any(each is layer.parameter for each in group["params"]):
                found: dict[str, Any] = group
                return found
        raise MethodError(f"{layer.name}: the optimizer no longer holds its weight; sparsify the model anew")


class Rule(ABC):
    """One way to come to masks. The steps of a training call, in this order:

    ``begin`` once; then for each optimizer step ``gradient`` of every layer that has one, with the dense gradient of
    the loss by the weight that the model computed with; the optimizer's own step; ``update``.

    ``keeps_dense``: dropped weights go on learning, and may come back with the value they have then.
    ``default`` is the schedule where the user names none, given the number of steps.
    """

    name: ClassVar[str]
    keeps_dense: ClassVar[bool] = False
    # whether masks are there from the first step on, so that a start method can choose them
    starts_sparse: ClassVar[bool] = False
    # whether masks change at all once training has begun
    changes_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings of the dataclass that are no numbers, or no whole ones where the default is one."""
        for each in fields(self):  # type: ignore[arg-type]
            if isinstance(each.default, int | float | tuple):
                require_numbers(each.name, getattr(self, each.name), each.default)

    def default(self, steps: int) -> Schedule:
        """The schedule where the user gives none."""
        return Schedule()

    def schedule(self, given: str | Schedule | None, steps: int) -> Schedule:
        """The schedule itself, the default with the curve of that name, or the default; MethodError for another."""
        found = given
        if given is None:
            found = self.default(steps)
        elif isinstance(given, str):
            if given not in CURVES:
                raise MethodError(f'a schedule "{given}" is not known; choose one of {", ".join(CURVES)}')
            found = replace(self.default(steps), curve=given)
        if not isinstance(found, Schedule):
            raise MethodError(f"schedule is a {type(given).__name__}; give a curve's name or a sparsecomp Schedule")
        found.check(steps)
        return found

    def require(self, patterns: Mapping[str, Pattern], scope: Scope) -> None:  # noqa: B027  (a rule may have nothing to do then)
        """Raises PatternError or MethodError for patterns the rule cannot follow."""

    def shares(self, layers: Sequence[TrainedLayer], scope: Scope) -> Mapping[str, float] | None:
        """The densities by layer name with which each layer starts, where the rule shares one out; else None."""
        return None

    def require_optimizer(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027  (a rule may take any)
        """Raises MethodError for an optimizer that the rule cannot work with."""

    def describe(self, progress: Progress) -> str | None:
        """A line for those who print the training, or None."""
        return None

    def begin(self, progress: Progress) -> None:  # noqa: B027  (a rule may have nothing to do then)
        """Prepare the state of each layer; masks may be chosen here too."""

    def gradient(self, progress: Progress, layer: TrainedLayer, gradient: Tensor) -> Tensor:
        """What the optimizer gets for the learned weight, from the dense gradient [as stored]; may be in place.

        Where dropped weights do not learn, the gradient is masked.
        """
        return gradient if self.keeps_dense else gradient.mul_(layer.mask)

    def before(self, progress: Progress) -> None:  # noqa: B027  (a rule may have nothing to do then)
        """Called after the gradients of all layers, before the optimizer's step, which it may replace for some."""

    @abstractmethod
    def update(self, progress: Progress) -> None:
        """Choose masks, after the optimizer's step ``progress.step``; the handle applies them."""

    def finish(self, progress: Progress) -> None:  # noqa: B027  (a rule may have nothing to do then)
        """Called once by ``bake``, before masks become zeros for good."""


def require_numbers(name: str, value: object, default: object) -> None:
    """Raises MethodError unless ``value`` is a number like ``default``, or as many of them as it has."""
    if isinstance(default, tuple):
        if isinstance(value, tuple | list) and len(value) == len(default) and all(map(_is_number, value)):
            return
        wanted = f"{len(default)} numbers"
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return
        wanted = "a whole number"
    else:
        if _is_number(value):
            return
        wanted = "a number"
    raise MethodError(f"{name}={value!r} is not allowed; give {wanted}, such as {default}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


_RULES: dict[str, type[Rule]] = {}
_Made = TypeVar("_Made", bound=type[Rule])


def rule(made: _Made) -> _Made:
    """Register the decorated class under its name."""
    _RULES[made.name] = made
    return made


def rule_names() -> tuple[str, ...]:
    """Names of the rules, in the order of registration."""
    return tuple(_RULES)


def get_rule(method: str | Rule) -> Rule:
    """The rule of that name with its default settings, or the rule itself; MethodError for another, listing them."""
    if isinstance(method, Rule):
        return method
    if isinstance(method, str) and method in _RULES:
        return _RULES[method]()
    near = difflib.get_close_matches(str(method), _RULES, n=1)
    hint = f'did you mean "{near[0]}"?' if near else "choose one of them"
    raise MethodError(f'unknown method of sparse training "{method}"; the methods are {", ".join(_RULES)}; {hint}')
