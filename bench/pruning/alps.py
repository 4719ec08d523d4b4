"""ALPS (Meng et al. 2024, arXiv:2406.07831) as published, to compare with: its schedule of rho, its 10 CG steps.

Knows nothing of the package's own mask search but the projection on a pattern.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.patterns import Pattern
from sparsecomp.patterns.project import project

_STEPS, _EVERY, _SWITCH, _CG_STEPS = 300, 3, 30, 10


def alps(weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """The pruned weight float32 [out, in] from ``weight`` and ``gram`` X^T X [in, in]."""
    h = gram.float().clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    norm = h.diagonal().sqrt() + 1e-8
    h = h / norm / norm[:, None]
    dense = weight.float() * norm
    pull = dense @ h
    spectrum, basis = torch.linalg.eigh(h.double())
    mask = project(dense.abs(), pattern)
    first = dense * mask
    masked, dual, free = first.clone(), torch.zeros_like(dense), dense
    rho, grown, before = 0.1, False, mask
    inverse = _shifted(spectrum, basis, rho)
    budget = int(mask.sum())
    for step in range(1, _STEPS + 1):
        free = (pull - dual + rho * masked) @ inverse
        proposal = free + dual / rho
        mask = project(proposal.abs(), pattern)
        masked = proposal * mask
        dual = dual + rho * (free - masked)
        if step % _EVERY:
            continue
        changed = int((mask ^ before).sum())
        if changed > 0.1 * budget:
            rho, grown = rho * 1.3, True
        elif changed > 0.005 * budget:
            rho, grown = rho * 1.2, True
        elif changed and grown:
            rho *= 1.1
        elif changed:
            rho, masked, dual = rho / 5, first.clone(), torch.zeros_like(dense)
        elif grown:
            break
        else:
            rho /= 5
        before = mask
        rho = min(rho, 1e6)
        inverse = _shifted(spectrum, basis, rho)
        if step > _SWITCH and changed < 0.0003 * budget:
            break
    mask = project(free.abs(), pattern)
    return _solve(h, pull, free * mask, mask) / norm


def _shifted(spectrum: Tensor, basis: Tensor, rho: float) -> Tensor:
    return ((basis / (spectrum + rho)) @ basis.T).float()


def _solve(h: Tensor, pull: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """Conjugate gradients on the kept weights of each row, without a preconditioner."""
    values = start.clone()
    residual = (pull - values @ h) * mask
    direction = residual.clone()
    energy = residual.square().sum(dim=1, keepdim=True)
    for _ in range(_CG_STEPS):
        product = direction @ h
        step = energy / (direction * product).sum(dim=1, keepdim=True).clamp_min(1e-30)
        values = values + step * direction
        residual = (residual - step * product) * mask
        after = residual.square().sum(dim=1, keepdim=True)
        direction = residual + after / energy.clamp_min(1e-30) * direction
        energy = after
    return values
