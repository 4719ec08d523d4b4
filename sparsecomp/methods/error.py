"""How far a pruned layer is from the dense one, on a Gram matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_COLUMNS = 512


def relative_error(weight: Tensor, pruned: Tensor, gram: Tensor | None = None) -> float:
    """||(W-V)X|| / ||WX|| = sqrt(tr((W-V) G (W-V)^T) / tr(W G W^T)), Frobenius norms, undamped, in float64.

    ``weight`` W and ``pruned`` V [out, in] of any float dtype; ``gram`` G = X^T X [in, in] over the rows of X, or None
    for the identity, which gives ||W-V|| / ||W||. 0.0 if nothing changes on G; inf if only the dense output is zero.
    """
    changed = energy(weight.double() - pruned.double(), gram)
    whole = energy(weight.double(), gram)
    if changed == 0.0:
        return 0.0
    return math.sqrt(changed / whole) if whole > 0.0 else math.inf


def energy(weight: Tensor, gram: Tensor | None) -> float:
    """tr(W G W^T) for a float64 W; rounding below zero counts as zero."""
    if gram is None:
        return float(weight.square().sum())
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    # by blocks of columns, for a float64 copy of a large Gram would be the largest thing in memory; G is symmetric, so
    # that what lies above its diagonal blocks counts twice and what lies below need not be multiplied
    for start in range(0, weight.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, weight.shape[1])
        pull = 2.0 * (weight[:, :start] @ gram[:start, start:end].double())
        pull += weight[:, start:end] @ gram[start:end, start:end].double()
        total += (pull * weight[:, start:end]).sum()
    return max(float(total), 0.0)
