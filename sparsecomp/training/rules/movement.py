"""Movement pruning: the mask keeps the largest of scores that learn whether a weight moves away from zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules.base import Progress, rule
from sparsecomp.training.rules.scores import SCORE, LearnedScores


@rule
@dataclass(frozen=True)
class Movement(LearnedScores):
    """Movement pruning, top-K (Sanh et al. 2020, arXiv:2005.07683), with the scores S of ``LearnedScores``.

    The mask keeps the largest S at the density that the schedule asks for, in each layer by its own pattern or with
    ``scope="global"`` over all layers. Where a pattern keeps or drops weights together, their scores are summed.
    Masks change about 70 times by default, as a choice among all weights costs more than a step on their scores.
    """

    name: ClassVar[str] = "movement"

    def learn(self, progress: Progress, layer: TrainedLayer, moved: Tensor, lr: float) -> None:
        """Descend on the loss alone."""
        self.descend(layer, moved, lr)

    def update(self, progress: Progress) -> None:
        """The largest scores of now."""
        if progress.schedule.acts(progress.step, progress.steps):
            progress.choose_signed({each.name: each.state[SCORE] for each in progress.layers})
