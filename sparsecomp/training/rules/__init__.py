"""The rules by which masks come about while a model is trained, a file for each family."""

from sparsecomp.training.rules import fixed, movement, rigl, soft_movement, straight_through  # noqa: F401  (they register)
from sparsecomp.training.rules.base import Progress, Rule, get_rule, rule_names

__all__ = ["Progress", "Rule", "get_rule", "rule_names"]
