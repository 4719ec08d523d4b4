"""Soft movement pruning: the mask is where scores lie above a threshold, and a Lagrangian holds them to a density."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecomp.errors import MethodError, PatternError
from sparsecomp.patterns import Block, Pattern, Unstructured
from sparsecomp.training.choice import LEAST_DENSITY, Scope, from_units, largest_of, largest_units
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules.base import Progress, rule
from sparsecomp.training.rules.scores import SCORE, LearnedScores

_THRESHOLD, _LINEAR, _QUADRATIC, _FORCE = "threshold", "linear", "quadratic", "force"
_SIZE, _SUM, _WIDTH = "size", "sum", "width"


@rule
@dataclass(frozen=True)
class SoftMovement(LearnedScores):
    """Soft movement pruning (Sanh et al. 2020, arXiv:2005.07683) that meets a density without a sweep of its penalty.

    M = [sigmoid(S) >= tau], with the scores S of ``LearnedScores``. tau is where the lowest score of all lies when the
    warm-up ends. From then on S also descends on a penalty, whose strength follows from the density s* that the
    schedule asks for, as in CoFi (Xia et al. 2022, arXiv:2204.00408): with d = (s - s*) / s*, held within -1 and 1,
    the penalty is a d + b d^2, and a and b ascend on it. For a and b, s is the share of units that M keeps. That has
    no gradient for S, so there s is the mean of sigmoid((S - theta) / T), with theta = logit(tau) and T the standard
    deviation of all S times ``temperature``, and each S gets

        (a + 2 b d) * size * 4 p (1 - p),   p = sigmoid((S - theta) / T).

    ``size`` is the running mean of |dL/dM|, in which a and b are measured, so that they need no tuning to a loss.
    ``linear`` and ``quadratic`` are a and b at first; at each step a grows by ``ascent`` d / r and b by ``ascent``
    d^2 / r, where r is the number of steps from the warm-up to the cool-down.

    After every step dropped weights are 0 and M is what stood above tau at the last choice, with the least share of
    each layer. Its density follows s* closely, above and below, and is not bound to it. At the last choice tau moves
    to where exactly the asked share, ceil(density * units), lies above, as the Lagrangian leaves a few tenths of a
    point; from then on M stays.

    Layers share out one density, so this takes ``scope="global"`` with "unstructured:D" or "blockRxC:D".
    """

    name: ClassVar[str] = "soft-movement"
    damping: float = 0.1
    temperature: float = 1.0
    linear: float = 0.0
    quadratic: float = 4.0
    ascent: float = 60.0

    def __post_init__(self) -> None:
        """Refuse settings that hold no density."""
        super().__post_init__()
        for name in ("temperature", "ascent"):
            if not getattr(self, name) > 0.0:
                raise MethodError(f"{name}={getattr(self, name)} holds no density; give a number above 0")

    def require(self, patterns: Mapping[str, Pattern], scope: Scope) -> None:
        """Raises PatternError for anything but one density over all layers."""
        for name, pattern in patterns.items():
            if not isinstance(pattern, Unstructured | Block):
                raise PatternError(
                    f'{name}: "soft-movement" keeps what lies above one threshold, and "{pattern}" as many in every '
                    'group; use the method "movement", or "unstructured:D" or "blockRxC:D" with scope="global"'
                )
        if scope != "global":
            raise PatternError(
                '"soft-movement" shares one density out over all layers; pass scope="global", or use the method '
                '"movement"'
            )

    def begin(self, progress: Progress) -> None:
        """Scores of 0, no threshold yet."""
        super().begin(progress)
        progress.extra |= {_LINEAR: self.linear, _QUADRATIC: self.quadratic, _FORCE: 0.0, _SIZE: 0.0, _SUM: 0.0}

    def learn(self, progress: Progress, layer: TrainedLayer, moved: Tensor, lr: float) -> None:
        """Descend on the loss and the penalty."""
        extra = progress.extra
        extra[_SUM] += float(moved.abs().sum())
        if extra[_FORCE]:
            inside = torch.sigmoid((layer.state[SCORE] - extra[_THRESHOLD]) / extra[_WIDTH])
            moved.add_(inside * (1.0 - inside), alpha=4.0 * float(extra[_FORCE]) * float(extra[_SIZE]))
        self.descend(layer, moved, lr)

    def update(self, progress: Progress) -> None:
        """Count, ascend, and where the schedule has masks change, keep what lies above the threshold."""
        extra, schedule = progress.extra, progress.schedule
        last = schedule.last(progress.steps)
        if progress.step > last:
            return
        scores = {
            each.name: each.state[SCORE] if isinstance(each.pattern, Block) else each.grouped(each.state[SCORE])
            for each in progress.layers
        }
        total = max(sum(each.numel() for each in scores.values()), 1)
        mean = float(extra[_SUM]) / total
        extra[_SIZE] = 0.99 * float(extra[_SIZE]) + 0.01 * mean if extra[_SIZE] else mean
        extra[_SUM] = 0.0
        goal = progress.layers[0].pattern.density
        asked = schedule.density(progress.step, progress.steps, goal)
        if progress.step == last:
            progress.set_masks(largest_units(progress.layers, scores, goal))
        elif asked < 1.0:
            threshold = float(extra.setdefault(_THRESHOLD, _lowest(scores)))
            kept = {name: each >= threshold for name, each in scores.items()}
            share = sum(int(each.count_nonzero()) for each in kept.values()) / total
            extra[_WIDTH] = max(self.temperature * _spread(scores, total), 1e-12)
            self._ascend(progress, share, asked)
            if schedule.acts(progress.step, progress.steps):
                for layer in progress.layers:
                    held = _with_least(kept[layer.name], scores[layer.name], min(LEAST_DENSITY, goal))
                    layer.set_mask(from_units(layer, held))

    def _ascend(self, progress: Progress, share: float, asked: float) -> None:
        extra, schedule = progress.extra, progress.schedule
        off = max(-1.0, min(1.0, (share - asked) / asked))
        rate = self.ascent / (schedule.last(progress.steps) - schedule.warm_up)
        extra[_LINEAR] += rate * off
        extra[_QUADRATIC] += rate * off**2
        extra[_FORCE] = extra[_LINEAR] + 2.0 * extra[_QUADRATIC] * off


def _lowest(scores: Mapping[str, Tensor]) -> float:
    return min((float(each.min()) for each in scores.values() if each.numel()), default=0.0)


def _spread(scores: Mapping[str, Tensor], total: int) -> float:
    """The standard deviation of all scores."""
    mean = sum(float(each.sum(dtype=torch.float64)) for each in scores.values()) / total
    squares = sum(float(torch.linalg.vector_norm(each - mean)) ** 2 for each in scores.values())
    return math.sqrt(squares / total)


def _with_least(kept: Tensor, scores: Tensor, share: float) -> Tensor:
    """What is kept, or the largest ``share`` of the scores where that is more."""
    least = math.ceil(share * scores.numel() - 1e-9)
    if int(kept.count_nonzero()) >= least:
        return kept
    return largest_of(scores.flatten(), least).view(scores.shape)
