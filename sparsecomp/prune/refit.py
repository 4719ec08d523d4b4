"""The best values of the kept weights for a mask that stays: conjugate gradients, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.prune.objective import Objective

REFIT_STEPS = 200
_TOLERANCE = 3e-4


def refit(layer: Objective, weight: Tensor, mask: Tensor, steps: int = REFIT_STEPS) -> tuple[Tensor, bool]:
    """(weight, converged): least squares of the kept weights, from ``weight`` [out, in] (scaled, zero off ``mask``).

    Conjugate gradients on each row's masked normal equations. The coordinates make H's diagonal one, which is the
    Jacobi preconditioner. It has converged when in every row a step lowers the loss by less than 3e-4 of it.
    """
    target = (layer.weight - weight) @ layer.gram
    loss = ((layer.weight - weight) * target).sum(dim=1)
    residual = target * mask
    direction = residual.clone()
    energy = residual.square().sum(dim=1)
    values = weight.clone()
    for _ in range(steps):
        product = direction @ layer.gram
        curvature = (direction * product).sum(dim=1)
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        values.addcmul_(direction, step[:, None])
        residual.addcmul_(product, step[:, None], value=-1).mul_(mask)
        after = residual.square().sum(dim=1)
        gain = step * energy
        loss = loss - gain
        if bool((gain <= _TOLERANCE * loss).all()):
            return values, True
        direction.mul_((after / energy.clamp_min(1e-38))[:, None]).add_(residual)
        energy = after
    return values, False
