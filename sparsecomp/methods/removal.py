"""Dropping weights of one group of columns at the least loss, given how the loss responds.

A group's loss around its best values c (one row, M columns) is (v-c) A (v-c)^T. With B = A^-1, forcing the columns S
to zero costs c_S (B_SS)^-1 c_S^T and moves the rest to c - lambda B, where lambda = (B_SS)^-1 c_S on S and 0 elsewhere
(Hassibi and Stork 1993; Frantar and Alistarh 2022, arXiv:2208.11580, for more than one weight).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.patterns import NM, VNM
from sparsecomp.patterns.subsets import Subsets, subsets_of

_MOST_SWAPS = 4
_ROUNDING = 1e-5


class Removal(Protocol):
    """For each of G groups, what to drop in every row."""

    def __call__(self, group: int, values: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``values`` c [out, M] -> (lambda float32 [out, M], kept bool [out, M]); ``kept`` is the present choice."""


def removal(pattern: NM | VNM, inverses: Tensor) -> Removal:
    """The removal for groups with B = ``inverses`` [G, M, M], symmetric and positive definite, float64.

    Exact over all subsets (and over all tiles of rows that choose together) up to MOST_SUBSETS subsets of a group;
    greedy removal improved by swaps beyond.
    """
    subsets = subsets_of(pattern)
    if subsets is not None:
        return _Exact(subsets, inverses)
    assert isinstance(pattern, NM)
    return _Greedy(pattern, inverses)


class _Exact:
    """Tries every subset."""

    def __init__(self, subsets: Subsets, inverses: Tensor) -> None:
        self.subsets = subsets
        device = inverses.device
        dropped = subsets.dropped.to(device)
        self.kept = subsets.kept.to(device)
        size = inverses.shape[1]
        self.count = dropped.shape[1]
        blocks = inverses[:, dropped[:, :, None], dropped[:, None, :]]  # [G, P, s, s]
        eye = torch.eye(self.count, dtype=inverses.dtype, device=device)
        roots = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), eye, upper=False)
        select = functional.one_hot(dropped, size).to(inverses.dtype)  # [P, s, M]
        roots = roots @ select  # c_S (B_SS)^-1 c_S^T = |roots c|^2
        self.roots = roots.flatten(1, 2).transpose(1, 2).float().contiguous()  # [G, M, P*s]
        self.solves = (roots.transpose(2, 3) @ roots).float()  # [G, P, M, M]

    def __call__(self, group: int, values: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = (values @ self.roots[group]).square_()
        cost = parts.view(values.shape[0], len(self.kept), self.count).sum(dim=2)
        chosen = self.subsets.choose(cost)
        solve = self.solves[group].index_select(0, chosen)
        return torch.bmm(values.unsqueeze(1), solve).squeeze(1), self.kept.index_select(0, chosen)


class _Greedy:
    """Drops one column after the other, then exchanges a dropped and a kept one while that pays.

    Works on the tableau of the sweep operator: -(B_SS)^-1 between dropped columns, their Schur complement between kept
    ones, B_kS (B_SS)^-1 between the two. Moving a column into S or out of it is one rank-one step.
    """

    def __init__(self, pattern: NM, inverses: Tensor) -> None:
        self.drop = pattern.m - pattern.n
        self.rows = pattern.mask_rows
        self.inverses = inverses.float()

    def __call__(self, group: int, values: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, size = values.shape
        tiles = functional.pad(values, (0, 0, 0, -out % self.rows)).view(-1, self.rows, size)
        count = tiles.shape[0]
        tableau = self.inverses[group].expand(count, -1, -1).clone()
        residual = tiles.clone()  # c - B_.S lambda on kept columns, lambda on dropped ones
        dropped = torch.zeros(count, size, dtype=torch.bool, device=values.device)
        if kept is None:
            for _ in range(self.drop):
                gain = residual.square().sum(dim=1) / tableau.diagonal(dim1=1, dim2=2)
                column = gain.masked_fill(dropped, torch.inf).argmin(dim=1)
                _sweep(tableau, residual, dropped, column)
        else:
            first = functional.pad(kept, (0, 0, 0, -out % self.rows)).view(-1, self.rows, size)
            order = first.any(dim=1).to(torch.uint8).sort(dim=1, stable=True).indices
            for step in range(self.drop):
                _sweep(tableau, residual, dropped, order[:, step])
        active = torch.arange(count, device=values.device)
        for _ in range(_MOST_SWAPS):
            active = _swap(tableau, residual, dropped, active)
        kept_now = ~dropped.repeat_interleave(self.rows, dim=0)[:out]
        multipliers = (residual * dropped[:, None]).flatten(0, 1)[:out]
        return multipliers, kept_now


def _sweep(tableau: Tensor, residual: Tensor, dropped: Tensor, column: Tensor) -> None:
    """Move ``column`` [tiles] into S where it is outside, out of S where it is inside; all in place."""
    tiles = torch.arange(len(column), device=column.device)
    row = tableau[tiles, column]  # [tiles, M]; indexing copies
    value = residual[tiles, :, column]  # [tiles, rows]
    pivot = row[tiles, column]
    sign = 1.0 / torch.where(dropped[tiles, column], -pivot, pivot)
    part = row / pivot[:, None]
    tableau.baddbmm_(row.unsqueeze(2), part.unsqueeze(1), alpha=-1)
    residual.baddbmm_(value.unsqueeze(2), part.unsqueeze(1), alpha=-1)
    tableau[tiles, column] = row * sign[:, None]
    tableau[tiles, :, column] = row * sign[:, None]
    tableau[tiles, column, column] = -1.0 / pivot
    residual[tiles, :, column] = value * sign[:, None]
    dropped[tiles, column] ^= True


def _swap(tableaus: Tensor, residuals: Tensor, drops: Tensor, active: Tensor) -> Tensor:
    """Exchange the best pair of a dropped and a kept column in each ``active`` tile; gives the tiles that gained."""
    tableau, residual, dropped = tableaus[active], residuals[active], drops[active]
    diagonal = tableau.diagonal(dim1=1, dim2=2)
    inverse = -diagonal[:, :, None]  # ((B_SS)^-1)_ii for dropped i
    back = residual.square().sum(dim=1)[:, :, None] / inverse
    # what dropping column j costs once column i is back
    shifted = residual[:, :, None, :] + (residual / inverse.transpose(1, 2))[..., None] * tableau[:, None]
    cost = shifted.square().sum(dim=1) / (diagonal[:, None, :] + tableau.square() / inverse)
    change = (cost - back).masked_fill(~(dropped[:, :, None] & ~dropped[:, None, :]), torch.inf)
    best, pair = change.flatten(1).min(dim=1)
    # a gain within rounding could be undone by the next exchange
    total = back.squeeze(2).masked_fill(~dropped, 0.0).amax(dim=1)
    better = (best < -_ROUNDING * total).nonzero().squeeze(1)
    size = dropped.shape[1]
    parts = tableau[better], residual[better], dropped[better]
    for column in (pair[better] // size, pair[better] % size):
        _sweep(*parts, column)
    gained = active[better]
    for whole, part in zip((tableaus, residuals, drops), parts, strict=True):
        whole[gained] = part
    return gained
