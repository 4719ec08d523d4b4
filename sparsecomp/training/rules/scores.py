"""Scores that are learned beside the weights, for movement pruning: their gradient, their Adam, their learning rate."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecomp.errors import MethodError
from sparsecomp.patterns import Block
from sparsecomp.training.choice import unit_sums
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules.base import Progress, Rule
from sparsecomp.training.schedule import Schedule

SCORE = "score"
_FIRST, _SECOND, _COUNT = "score_exp_avg", "score_exp_avg_sq", "score_step"


@dataclass(frozen=True)
class LearnedScores(Rule):
    """A score S for each weight, or for each block, that begins at 0 and descends on dL/dM through the mask M.

    The model computes with W' = M * W, so that dL/dM = dL/dW' * W for all weights, dropped ones too; a block gets the
    sum over its weights. Adam (``lr``, ``betas``, no weight decay) steps on S at every step of the optimizer, with the
    gradient that the optimizer has: averaged, unscaled and clipped. The epsilon of Adam is ``damping`` times the root
    mean square of the layer's gradient. With an epsilon of almost 0 a weight whose gradients are tiny and of one sign
    would score as high as one that matters. ``lr`` follows the learning rate of the weight: it is multiplied by the
    share of its peak that the optimizer has now. W gets dL/dW' * M: a dropped weight keeps its value. S stays as it is
    from the schedule's last choice on.
    """

    keeps_dense: ClassVar[bool] = True
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    damping: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings with which nothing is learned."""
        super().__post_init__()
        if not 0.0 < self.lr < math.inf:
            raise MethodError(f"lr={self.lr} of scores learns nothing; give a number above 0, such as 0.01")
        if not all(0.0 <= each < 1.0 for each in self.betas):
            raise MethodError(f"betas={self.betas} of scores are no shares; give two numbers from 0 to below 1")
        if not 0.0 <= self.damping < math.inf:
            raise MethodError(f"damping={self.damping} of scores is below 0; give a number from 0, such as 1.0")

    def default(self, steps: int) -> Schedule:
        """Cubic, with 7% of the steps as warm-up, 25% as cool-down, and about 70 choices of masks between them."""
        return Schedule("cubic", warm_up=int(0.07 * steps), cool_down=int(0.25 * steps), every=max(1, steps // 100))

    def begin(self, progress: Progress) -> None:
        """Scores of 0, and all weights kept."""
        for each in progress.layers:
            each.holds_dropped = True
            zeros = unit_sums(each, torch.zeros_like(each.weight, dtype=torch.float32))
            if not isinstance(each.pattern, Block):
                zeros = torch.zeros_like(each.weight, dtype=torch.float32)
            each.state = {SCORE: zeros, _FIRST: zeros.clone(), _SECOND: zeros.clone()}
            each.state[_COUNT] = torch.zeros((), dtype=torch.float32, device=zeros.device)

    def gradient(self, progress: Progress, layer: TrainedLayer, gradient: Tensor) -> Tensor:
        """dL/dW' * M, after a step of Adam on S."""
        if progress.step < progress.schedule.last(progress.steps):
            moved = gradient.float() * layer.weight.float()
            moved = unit_sums(layer, moved) if isinstance(layer.pattern, Block) else moved
            self.learn(progress, layer, moved, self.lr * _share_of_peak(progress, layer))
        return gradient.mul_(layer.mask)

    @abstractmethod
    def learn(self, progress: Progress, layer: TrainedLayer, moved: Tensor, lr: float) -> None:
        """Step on the layer's S with its gradient ``moved``, in the shape of S, which may be written to."""

    def descend(self, layer: TrainedLayer, gradient: Tensor, lr: float) -> None:
        """One step of Adam on the layer's S; what Adam remembers lies in the layer's state."""
        state = layer.state
        score = state[SCORE]
        if score.numel() == 0:
            return
        fused = score.device.type in ("cpu", "cuda")
        size = float(torch.linalg.vector_norm(gradient)) / math.sqrt(gradient.numel())
        adam = torch.optim.Adam(
            [score], lr=lr, betas=self.betas, eps=max(self.damping * size, 1e-30), fused=fused or None
        )
        adam.state[score] = {"step": state[_COUNT], "exp_avg": state[_FIRST], "exp_avg_sq": state[_SECOND]}
        score.grad = gradient
        adam.step()
        score.grad = None


def _share_of_peak(progress: Progress, layer: TrainedLayer) -> float:
    """The weight's learning rate by its peak, from 0 to 1: what a scheduler says it is, else the largest there was."""
    group = progress.group(layer)
    now = float(group["lr"])
    named = group.get("max_lr", group.get("initial_lr"))
    key = f"largest lr of {layer.name}"
    seen = max(now, float(progress.extra.get(key, 0.0)))
    progress.extra[key] = seen
    peak = float(named) if named is not None else seen
    return min(1.0, now / peak) if peak > 0.0 else 0.0
