"""Masks of the largest weights, chosen anew while dropped weights go on learning: SR-STE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsecomp.errors import MethodError
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules.base import Progress, Rule, rule


@rule
@dataclass(frozen=True)
class SrSte(Rule):
    """The sparse-refined straight-through estimator (Zhou et al. 2021, arXiv:2102.04010).

    The mask keeps the largest |w| of the dense weight W. The gradient g of the masked weight goes to W as it is, and
    dropped weights decay: W gets g + decay (1 - M) W. ``decay=0`` is the plain straight-through estimator.
    """

    name: ClassVar[str] = "sr-ste"
    keeps_dense: ClassVar[bool] = True
    decay: float = 2e-4

    def __post_init__(self) -> None:
        """Refuse a decay with which dropped weights would grow."""
        super().__post_init__()
        if not 0.0 <= self.decay < math.inf:
            raise MethodError(f"decay={self.decay} lets dropped weights grow; give 0 or a number above it, as 2e-4")

    def begin(self, progress: Progress) -> None:
        """Masks of the largest weights from the start, where the schedule asks for any."""
        progress.keep_largest()

    def gradient(self, progress: Progress, layer: TrainedLayer, gradient: Tensor) -> Tensor:
        """g + decay (1 - M) W."""
        if self.decay:
            gradient.add_(layer.weight.masked_fill(layer.mask, 0.0), alpha=self.decay)
        return gradient

    def update(self, progress: Progress) -> None:
        """The largest weights of now."""
        if progress.schedule.acts(progress.step, progress.steps):
            progress.keep_largest()
