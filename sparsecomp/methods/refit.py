"""The best values of the kept weights for a mask that stays: conjugate gradients, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.methods.objective import Objective

REFIT_STEPS = 200
TOLERANCE = 3e-4


def refit(
    layer: Objective, weight: Tensor, mask: Tensor, steps: int = REFIT_STEPS, tolerance: float = TOLERANCE
) -> tuple[Tensor, bool]:
    """(weight, converged): least squares of the kept weights, from ``weight`` [out, in] (scaled, zero off ``mask``).

    Conjugate gradients on each row's masked normal equations. The coordinates make H's diagonal one, which is the
    Jacobi preconditioner. It has converged when a step lowers no row's loss by more than ``tolerance`` of it.
    """
    target = (layer.weight - weight) @ layer.gram
    loss = _dots(layer.weight - weight, target)
    kept = mask.float()  # multiplying by booleans takes many times longer
    residual = target.mul_(kept)
    direction = residual.clone()
    energy = _dots(residual, residual)
    values = weight.clone()
    for _ in range(steps):
        product = direction @ layer.gram
        curvature = _dots(direction, product)
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        values.addcmul_(direction, step[:, None])
        residual.addcmul_(product, step[:, None], value=-1).mul_(kept)
        after = _dots(residual, residual)
        gain = step * energy
        loss = loss - gain
        if bool((gain <= tolerance * loss).all()):
            return values, True
        direction.mul_((after / energy.clamp_min(1e-38))[:, None]).add_(residual)
        energy = after
    return values, False


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """The product of each row of two matrices, without a matrix in between."""
    return torch.einsum("ij,ij->i", left, right)
