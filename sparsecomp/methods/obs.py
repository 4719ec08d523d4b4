"""Pruning in one pass over the columns, with the error of each column handed to the columns on its right.

SparseGPT drops weight by weight; ``obs`` drops all weights of a group (or a row's part of a block) at once, exactly.
Both freeze what lies to the left of the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.methods.objective import Objective, objective
from sparsecomp.methods.registry import Problem, Solution, method
from sparsecomp.methods.removal import removal
from sparsecomp.patterns import NM, VNM, Block, Pattern, Unstructured
from sparsecomp.patterns.project import project

# columns between updates of everything on their right: one large product instead of many thin ones
BLOCK = 128


def obs_sweep(problem: Objective, pattern: NM | VNM) -> tuple[Tensor, Tensor]:
    """(weight float32 [out, in] in scaled coordinates, mask): joint removal group by group, from left to right.

    The removal is exact given that columns to the left stay as they are: B is the group's block of the inverse of H
    restricted to the columns from the group on, U_g^T U_g with H^-1 = U^T U.
    """
    size = pattern.m
    columns = problem.weight.shape[1]
    weight = functional.pad(problem.weight, (0, -columns % size))
    upper = pad_square(problem.inverse_factor, size)
    mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        local = upper[start:end, start:end]
        diagonal = diagonal_blocks(local, size)
        doubled = diagonal.double()
        drop = removal(pattern, doubled.transpose(1, 2) @ doubled)
        part = weight[:, start:end].clone()
        errors = torch.empty_like(part)
        for group in range((end - start) // size):
            first, last = group * size, (group + 1) * size
            multipliers, kept = drop(group, part[:, first:last])
            errors[:, first:last] = multipliers @ diagonal[group].T
            part[:, first:] -= errors[:, first:last] @ local[first:last, first:]
            mask[:, start + first : start + last] = kept
        weight[:, start:end] = part
        weight[:, end:] -= errors @ upper[start:end, end:]
    mask = mask[:, :columns].contiguous()
    return weight[:, :columns] * mask, mask


def sparsegpt_sweep(problem: Objective, pattern: Pattern, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(weight float32 [out, in] in scaled coordinates, mask): SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774).

    Weights are ranked by w_j^2 / U_jj^2 when the pass reaches their group (for unstructured patterns, their block of
    128 columns; for blocks, before the pass). A ``mask`` (bool [out, in]) that is given is kept.
    """
    out, columns = problem.weight.shape
    weight = problem.weight.clone()
    upper = problem.inverse_factor
    given = mask
    step = _ranked_together(pattern)
    if given is None and step is None:
        given = project(weight.abs() / upper.diagonal(), pattern)
    chosen = torch.ones(out, columns, dtype=torch.bool, device=weight.device) if given is None else given.clone()
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        part = weight[:, start:end].clone()
        local = upper[start:end, start:end]
        errors = torch.empty_like(part)
        for column in range(end - start):
            if given is None and step is not None and column % step == 0:
                last = min(column + step, end - start)
                scores = part[:, column:last].abs() / local.diagonal()[column:last]
                chosen[:, start + column : start + last] = _ranked(scores, pattern, start + column, columns)
            dropped = ~chosen[:, start + column]
            errors[:, column] = part[:, column] * dropped / local[column, column]
            part[:, column:] -= errors[:, column, None] * local[column, column:]
        weight[:, start:end] = part
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight * chosen, chosen


def _ranked_together(pattern: Pattern) -> int | None:
    """Columns that are ranked when the pass reaches them; None: all of them before the pass."""
    match pattern:
        case NM() | VNM():
            return pattern.m
        case Unstructured():
            return BLOCK
        case Block():
            return None


def _ranked(scores: Tensor, pattern: Pattern, start: int, columns: int) -> Tensor:
    """The mask of one group of columns beginning at ``start``."""
    if not isinstance(pattern, Unstructured):
        return project(scores, pattern)
    # what all columns up to the end of this block may keep, less what those before it did
    end = start + scores.shape[1]
    total = pattern.kept_per_row(columns)
    count = total * end // columns - total * start // columns
    return project(scores, Unstructured(count / scores.shape[1])) if count else torch.zeros_like(scores).bool()


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The diagonal blocks [G, size, size] of a square matrix."""
    groups = matrix.shape[0] // size
    index = torch.arange(groups, device=matrix.device)
    return matrix.view(groups, size, groups, size)[index, :, index, :]


def pad_square(matrix: Tensor, size: int) -> Tensor:
    """``matrix`` with an identity for the columns that complete the last group: they hold nothing and cost nothing."""
    missing = -matrix.shape[0] % size
    if missing:
        matrix = functional.pad(matrix, (0, missing, 0, missing))
        matrix.diagonal()[-missing:] = 1.0
    return matrix


@method("sparsegpt", needs_gram=True, description="SparseGPT: one pass, error handed to the right")
def _sparsegpt(problem: Problem) -> Solution:
    assert problem.gram is not None
    layer = objective(problem.weight, problem.gram)
    weight, mask = sparsegpt_sweep(layer, problem.pattern, problem.mask)
    return Solution(layer.unscale(weight), mask, layer.notes)


@method("obs", needs_gram=True, description="as SparseGPT, but exact for the weights of a group together")
def _obs(problem: Problem) -> Solution:
    assert problem.gram is not None
    layer = objective(problem.weight, problem.gram)
    weight, mask = swept(layer, problem.pattern, problem.mask)
    return Solution(layer.unscale(weight), mask, layer.notes)


def swept(layer: Objective, pattern: Pattern, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best one-pass start there is for ``pattern``: joint removal where weights go together, else SparseGPT's."""
    if mask is None and isinstance(pattern, NM | VNM) and pattern.density < 1.0:
        return obs_sweep(layer, pattern)
    if mask is None and isinstance(pattern, Block):
        mask = project(_block_scores(layer, pattern), pattern)
    return sparsegpt_sweep(layer, pattern, mask)


def _block_scores(layer: Objective, pattern: Block) -> Tensor:
    """Scores [out, in] whose squares add up, over a block, to the cost of removing it, columns on its left fixed.

    With those free to make up for it, too, the costs are far too low: about half of the columns will be gone.
    """
    size = pattern.cols
    out, columns = layer.weight.shape
    upper = diagonal_blocks(pad_square(layer.inverse_factor, size), size).double()
    roots = torch.linalg.cholesky(upper.transpose(1, 2) @ upper)
    weight = functional.pad(layer.weight, (0, -columns % size)).view(out, roots.shape[0], size, 1)
    cost = torch.linalg.solve_triangular(roots.float(), weight, upper=False).square().sum(dim=(2, 3))
    scores = torch.zeros_like(weight[..., 0])
    scores[:, :, 0] = cost.sqrt()
    return scores.flatten(1)[:, :columns]
