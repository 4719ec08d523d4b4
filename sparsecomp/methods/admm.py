"""Mask search by the alternating direction method of multipliers: a dense and a masked copy are pulled together.

Formulation of ALPS (Meng et al. 2024, arXiv:2406.07831) with a slower schedule of the penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp.methods.objective import Objective
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.project import project


@dataclass(frozen=True)
class Schedule:
    """The penalty rho starts at ``start`` (H has a unit diagonal) and grows ``growth``-fold every ``every`` steps.

    It ends when no more than a fraction ``settled`` of the mask has changed between two changes of rho, or
    after ``steps``.
    """

    start: float = 0.1
    growth: float = 1.05
    every: int = 3
    steps: int = 300
    settled: float = 1e-3


SLOW = Schedule()


def admm(layer: Objective, pattern: Pattern, schedule: Schedule = SLOW) -> tuple[Tensor, Tensor, bool]:
    """(weight float32 [out, in] in scaled coordinates, mask, settled).

    Minimises tr((B-W) H (B-W)^T) + penalty on B - D over dense B and masked D: B by one solve with H + rho I, D by
    projecting B + V / rho on the pattern, V += rho (B - D).
    """
    dense = layer.weight
    pull = dense @ layer.gram
    mask = project(dense.abs(), pattern)
    masked = dense * mask
    dual = torch.zeros_like(dense)
    rho = schedule.start
    before = mask
    for step in range(schedule.steps):
        if step % schedule.every == 0:
            if step:
                changed = int((mask ^ before).sum())
                if changed <= schedule.settled * mask.numel() and step > 20:
                    return masked, mask, True
                rho *= schedule.growth
            before = mask
            inverse = _inverse(layer.gram, rho)
        target = (pull - dual).add_(masked, alpha=rho) @ inverse
        masked = target + dual / rho
        mask = project(masked.abs(), pattern)
        masked *= mask
        dual += (target - masked).mul_(rho)
    return masked, mask, False


def _inverse(gram: Tensor, rho: float) -> Tensor:
    """(H + rho I)^-1, float32; rounding of it shifts a step, not what the steps settle on."""
    shifted = gram.clone()
    shifted.diagonal().add_(rho)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        factor = torch.linalg.cholesky(shifted.double())
    return torch.cholesky_inverse(factor).float()
