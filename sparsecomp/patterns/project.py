"""Scores [out, in] + pattern -> the best mask, exactly.

Knows nothing of how scores are made.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.patterns import NM, VNM, VNM_KEPT_COLUMNS, Block, Pattern, Unstructured
from sparsecomp.patterns.subsets import subsets_of


def project(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask (bool [out, in], True = kept) of ``pattern`` with the largest total of squared scores.

    ``scores`` [out, in] are finite and >= 0. Weights that stand alone are ranked by their score; where weights are
    kept or dropped together (rows that share a mask, V:N:M columns, blocks) the squares are summed in float64. Ties
    go to the lower column (blocks: to the first in row-major order). A last group, tile or block that the shape cuts
    short is judged by the weights it has: a group of r < N columns keeps all r.

    A transposable tile of M x M weights is judged as one, over all its patterns (90 for 2:4).

    V:N:M takes its two steps one after the other, 4 columns of each tile and then 2 of them in each row; each
    step is exact, the pair need not be.
    """
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    match pattern:
        case NM():
            return _nm(scores, pattern)
        case VNM():
            return _vnm(scores, pattern)
        case Block():
            return _block(scores, pattern)
        case Unstructured():
            return _largest(scores, pattern.kept_per_row(scores.shape[1]))


def _nm(scores: Tensor, pattern: NM) -> Tensor:
    out, columns = scores.shape
    if pattern.transposable:
        return _transposable(scores, pattern)
    if pattern.mask_rows == 1:
        return _ungroup(_top(_group(scores, pattern.m), pattern.n), columns)
    shared = _tile_sums(scores, pattern.mask_rows)
    mask = _ungroup(_top(_group(shared, pattern.m), pattern.n), columns)
    return mask.repeat_interleave(pattern.mask_rows, dim=0)[:out]


def _transposable(scores: Tensor, pattern: NM) -> Tensor:
    subsets = subsets_of(pattern)
    assert subsets is not None  # groups are small
    out, columns = scores.shape
    squares = functional.pad(scores.double().square(), (0, -columns % pattern.m)).view(out, -1, pattern.m)
    lost = squares @ (~subsets.kept).to(scores.device, torch.float64).T
    # one row of tiles after the other, so that the rows of a tile lie together
    ragged = functional.pad(lost, (0, 0, 0, 0, 0, -out % pattern.m)).transpose(0, 1).flatten(0, 1)
    kept = subsets.kept.to(scores.device)[subsets.choose(ragged)].view(lost.shape[1], -1, pattern.m)
    return _ungroup(kept.transpose(0, 1)[:out], columns)


def _vnm(scores: Tensor, pattern: VNM) -> Tensor:
    out, columns = scores.shape
    kept = _top(_group(_tile_sums(scores, pattern.v), pattern.m), VNM_KEPT_COLUMNS)
    kept = kept.repeat_interleave(pattern.v, dim=0)[:out]
    candidates = _group(scores, pattern.m).masked_fill(~kept, -torch.inf)
    return _ungroup(_top(candidates, pattern.n), columns)


def _block(scores: Tensor, pattern: Block) -> Tensor:
    out, columns = scores.shape
    sums = _block_sums(scores.double().square(), pattern)
    kept = _largest(sums.view(1, -1), pattern.kept_blocks(out, columns)).view(sums.shape)
    mask = kept.repeat_interleave(pattern.rows, dim=0).repeat_interleave(pattern.cols, dim=1)
    return mask[:out, :columns].contiguous()


def _top(groups: Tensor, count: int) -> Tensor:
    """True for the ``count`` largest of the last dimension, ties to the lower index; fast for small groups."""
    # position by position, so that every comparison runs along contiguous memory
    planes = groups.movedim(-1, 0).contiguous()
    rank = torch.zeros(planes.shape, dtype=torch.uint8, device=groups.device)
    for low in range(len(planes)):
        for high in range(low + 1, len(planes)):
            beaten = planes[high] > planes[low]
            rank[low] += beaten
            rank[high] += ~beaten
    return (rank < count).movedim(0, -1)


def _largest(scores: Tensor, count: int) -> Tensor:
    """True for the ``count`` largest of every row, ties to the lower column."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def _group(scores: Tensor, size: int) -> Tensor:
    """[rows, in] -> [rows, groups, size]; padding columns rank below every real one."""
    padded = functional.pad(scores, (0, -scores.shape[1] % size), value=-torch.inf)
    return padded.view(scores.shape[0], -1, size)


def _ungroup(mask: Tensor, columns: int) -> Tensor:
    return mask.reshape(mask.shape[0], -1)[:, :columns].contiguous()


def _tile_sums(scores: Tensor, rows: int) -> Tensor:
    """Squares summed over tiles of ``rows`` rows: [ceil(out / rows), in], float64."""
    squares = functional.pad(scores.double().square(), (0, 0, 0, -scores.shape[0] % rows))
    return squares.view(-1, rows, scores.shape[1]).sum(dim=1)


def _block_sums(values: Tensor, pattern: Block) -> Tensor:
    down, across = pattern.grid(*values.shape)
    missing = (0, across * pattern.cols - values.shape[1], 0, down * pattern.rows - values.shape[0])
    return functional.pad(values, missing).view(down, pattern.rows, across, pattern.cols).sum(dim=(1, 3))
