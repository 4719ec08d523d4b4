"""Block coordinate descent: one group at a time, mask and values are chosen anew for the present rest of the row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.methods.objective import Objective
from sparsecomp.methods.obs import BLOCK, diagonal_blocks, pad_square
from sparsecomp.methods.removal import removal
from sparsecomp.patterns import NM, VNM

_TOLERANCE = 1e-4


def descend(
    layer: Objective, weight: Tensor, mask: Tensor, pattern: NM | VNM, sweeps: int = 5
) -> tuple[Tensor, Tensor]:
    """(weight, mask) after at most ``sweeps`` passes, alternating in direction, from ``weight`` [out, in] (scaled).

    Given the other columns, the loss of a group is quadratic in its weights; ``removal`` finds the best masked values.
    No step raises the loss. Ends early when a pass lowers it by less than 1e-4.
    """
    size = pattern.m
    columns = weight.shape[1]
    missing = -columns % size
    values = functional.pad(weight, (0, missing))
    kept_now = functional.pad(mask, (0, missing))
    gram = pad_square(layer.gram, size)
    gradient = functional.pad((weight - layer.weight) @ layer.gram, (0, missing))
    inverses = torch.linalg.inv(diagonal_blocks(gram, size).double())
    loss = _loss(weight - layer.weight, gradient[:, :columns])
    starts = list(range(0, values.shape[1], BLOCK))
    for sweep in range(sweeps):
        for start in starts if sweep % 2 == 0 else reversed(starts):
            end = min(start + BLOCK, values.shape[1])
            inverse = inverses[start // size : end // size]
            drop = removal(pattern, inverse)
            single = inverse.float()
            local = gram[start:end, start:end]
            slope = gradient[:, start:end].clone()
            part = values[:, start:end].clone()
            for group in range((end - start) // size):
                first, last = group * size, (group + 1) * size
                here = slice(start + first, start + last)
                best = part[:, first:last] - slope[:, first:last] @ single[group]
                multipliers, kept = drop(group, best, kept_now[:, here])
                new = (best - multipliers @ single[group]) * kept
                slope += (new - part[:, first:last]) @ local[first:last]
                part[:, first:last] = new
                kept_now[:, here] = kept
            change = part - values[:, start:end]
            gradient += change @ gram[start:end]
            values[:, start:end] = part
        now = _loss(values[:, :columns] - layer.weight, gradient[:, :columns])
        if loss - now <= _TOLERANCE * loss:
            break
        loss = now
    return values[:, :columns].contiguous(), kept_now[:, :columns].contiguous()


def _loss(change: Tensor, gradient: Tensor) -> float:
    return float((change.double() * gradient).sum())
