"""Weight + Gram -> the least-squares problem all data-driven methods solve, damped and scaled.

The loss of a pruned weight V is tr((V-W) H (V-W)^T) with H = X^T X plus damping. Knows nothing of masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsecomp.errors import CalibrationError

DAMPING = 0.01
_RAISE = 10.0
_MOST_DAMPING = 10.0
# a channel counts at most so many medians in the mean: else a few outliers would damp all others away
_OUTLIER = 100.0


@dataclass(frozen=True, eq=False)
class Objective:
    """One layer in coordinates in which H has a unit diagonal: column j of a weight is multiplied by sqrt(H_jj).

    ``weight`` [out, in] float32; ``gram`` [in, in] float32, the scaled H; ``factor`` [in, in] float64, lower, is the
    Cholesky factor of H in float64; ``scale`` [in] float64 is sqrt(H_jj). Masks are the same in both coordinates.
    ``notes`` say what had to be done that was not asked for.
    """

    weight: Tensor
    gram: Tensor
    factor: Tensor
    scale: Tensor
    notes: tuple[str, ...] = ()

    def unscale(self, weight: Tensor) -> Tensor:
        """A weight [out, in] in the layer's own coordinates, float64."""
        return weight.double() / self.scale

    def losses(self, weight: Tensor) -> Tensor:
        """The damped loss of each row of a scaled weight: float64 [out]."""
        change = weight - self.weight
        return ((change @ self.gram).double() * change).sum(dim=1).clamp_min_(0.0)

    @cached_property
    def inverse_factor(self) -> Tensor:
        """The upper triangular U [in, in], float32, with H^-1 = U^T U: what removal column by column needs."""
        inverse = torch.cholesky_inverse(self.factor)
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper.float()


def objective(weight: Tensor, gram: Tensor, damping: float = DAMPING) -> Objective:
    """The problem of pruning ``weight`` [out, in] (float32 or float64) on ``gram`` X^T X [in, in] (float32 or float64).

    H = X^T X + damping * mean(diag) * I; in the mean no channel counts more than 100 times the median of those that
    are not zero. Input channels that are always zero ("dead") have damping for their diagonal, so that they go first
    and disturb nothing. A factorisation that fails is tried again with ten times the damping, and ``notes`` says so.
    Raises CalibrationError if no damping helps.
    """
    diagonal = gram.diagonal().double()
    alive = diagonal[diagonal > 0]
    # without any input every channel counts the same
    mean = float(diagonal.clamp_max(_OUTLIER * alive.median()).mean()) if alive.numel() else 1.0
    used = damping
    while used <= _MOST_DAMPING:
        scale = (diagonal + used * mean).sqrt()
        scaled = gram.double() / scale
        scaled /= scale[:, None]
        scaled.diagonal().fill_(1.0)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if int(failed) == 0 and bool(torch.isfinite(factor).all()):
            raised = f"the Gram is not positive definite at damping {damping:g}; it was raised to {used:g}"
            notes = (raised,) if used != damping else ()
            return Objective((weight.double() * scale).float(), scaled.float(), factor, scale, notes)
        used *= _RAISE
    raise CalibrationError(
        f"the Gram is no X^T X: it is not positive definite even with damping {_MOST_DAMPING:g} times its mean "
        "diagonal; recompute it in float32 or wider, for example with sc.calibrate"
    )
