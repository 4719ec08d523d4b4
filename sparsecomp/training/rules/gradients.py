"""Masks by how much the loss leans on a weight: first order, summed over steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecomp.errors import MethodError
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules.base import Progress, rule
from sparsecomp.training.rules.gradual import Dropping
from sparsecomp.training.survivors import next_change


@rule
@dataclass(frozen=True)
class Gradient(Dropping):
    """Drop the weights of the smallest |w g|, the change of the loss to first order if w went (SNIP, arXiv:1810.02340).

    One gradient says little, so the score of step n is momentum * score(n-1) + |w g|: ``momentum`` 1.0 sums over all
    steps, 0.0 takes the last one alone. ``state["score"]`` holds it, fp32, until masks have changed for the last time.

    Raises MethodError for a momentum outside [0, 1].
    """

    name: ClassVar[str] = "gradient"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what is no momentum."""
        super().__post_init__()
        if not 0.0 <= self.momentum <= 1.0:
            raise MethodError(f"momentum={self.momentum} is not allowed; give a number from 0 to 1")

    def gradient(self, progress: Progress, layer: TrainedLayer, gradient: Tensor) -> Tensor:
        """Add to the score; what is dropped does not learn."""
        if next_change(progress.schedule, progress.steps, layer, progress.step + 1) is not None:
            cost = (layer.weight.float() * gradient.float()).abs_()
            score = layer.state.get("score")
            layer.state["score"] = cost if score is None else score.mul_(self.momentum).add_(cost)
        return super().gradient(progress, layer, gradient)

    def saliency(self, progress: Progress, layer: TrainedLayer) -> Tensor:
        """The score; zero everywhere if the layer has had no gradient."""
        score = layer.state.get("score")
        return torch.zeros_like(layer.weight) if score is None else score

    def leave(self, progress: Progress, layer: TrainedLayer, mask: Tensor) -> None:
        """Forget the score after the last change."""
        if next_change(progress.schedule, progress.steps, layer, progress.step + 1) is None:
            layer.state.pop("score", None)
