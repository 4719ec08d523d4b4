"""Masks that are chosen once, before training, and stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecomp.training.rules.base import Progress, Rule, rule


@rule
@dataclass(frozen=True)
class Fixed(Rule):
    """Keep the masks of the start, whichever solver made them; train what they keep."""

    name: ClassVar[str] = "fixed"
    starts_sparse: ClassVar[bool] = True
    changes_masks: ClassVar[bool] = False

    def update(self, progress: Progress) -> None:
        """Nothing changes."""
