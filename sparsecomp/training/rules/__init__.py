"""The rules by which masks come about while a model is trained, a file for each family."""

from sparsecomp.training.rules import (  # noqa: F401  (they register)
    fixed,
    gradients,
    gradual,
    movement,
    rigl,
    second_order,
    soft_movement,
    step,
    straight_through,
)
from sparsecomp.training.rules.base import Progress, Rule, get_rule, rule_names

__all__ = ["Progress", "Rule", "get_rule", "rule_names"]
