"""Scores [out, in] + pattern -> the best mask, exactly.

Knows nothing of how scores are made.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.patterns import NM, VNM, VNM_KEPT_COLUMNS, Block, Pattern, Unstructured
from sparsecomp.patterns.largest import largest, top
from sparsecomp.patterns.subsets import Subsets, subsets_of

# tiles of a transposable pattern that are judged at once: their sums stay in the cache
_TILES_AT_ONCE = 8192


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
            return largest(scores, pattern.kept_per_row(scores.shape[1]))


def _nm(scores: Tensor, pattern: NM) -> Tensor:
    out, columns = scores.shape
    if pattern.transposable:
        return _transposable(scores, pattern)
    if pattern.mask_rows == 1:
        return _ungroup(top(_group(scores, pattern.m), pattern.n), columns)
    shared = _tile_sums(scores, pattern.mask_rows)
    mask = _ungroup(top(_group(shared, pattern.m), pattern.n), columns)
    return mask.repeat_interleave(pattern.mask_rows, dim=0)[:out]


def _transposable(scores: Tensor, pattern: NM) -> Tensor:
    if pattern.n == pattern.m:
        return torch.ones_like(scores, dtype=torch.bool)
    subsets = subsets_of(pattern)
    assert subsets is not None and subsets.table is not None  # groups are small
    (out, columns), m = scores.shape, pattern.m
    padded = functional.pad(scores, (0, -columns % m, 0, -out % m))
    down, across = padded.shape[0] // m, padded.shape[1] // m
    # [row of a tile, column of a tile, tiles], so that every sum runs along contiguous memory
    planes = padded.view(-1, across, m).movedim(-1, 0).contiguous().double().square()
    squares = planes.view(m, down, m, across).transpose(0, 2).transpose(1, 2).reshape(m, m, -1)
    chosen = torch.cat([_least_lost(part, subsets) for part in torch.split(squares, _TILES_AT_ONCE, dim=2)])
    kept = subsets.kept[subsets.table].to(scores.device)[chosen.long()]  # [tiles, m, m]
    whole = kept.view(down, across, m, m).transpose(1, 2).reshape(down * m, across * m)
    return whole[:out, :columns].contiguous()


def _least_lost(squares: Tensor, subsets: Subsets) -> Tensor:
    """Which row of the table drops least of squares [row, column, tiles], the first of equals: uint8 [tiles].

    Sums run from the first row of a tile to the last; the table is in order: those that begin alike are made once.
    """
    assert subsets.table is not None
    rows = len(squares)
    ways = subsets.dropped.tolist()
    lost = [[reduce(torch.add, (row[each] for each in dropped)) for dropped in ways] for row in squares]
    sums = squares.new_zeros(rows + 1, squares.shape[2])
    best = squares.new_full(squares.shape[2:], torch.inf)
    chosen = torch.zeros(squares.shape[2], dtype=torch.uint8, device=squares.device)
    before: list[int] = [-1] * rows
    for index, subset in enumerate(subsets.table.tolist()):
        first = next(row for row in range(rows) if subset[row] != before[row])
        for row in range(first, rows):
            torch.add(sums[row], lost[row][subset[row]], out=sums[row + 1])
        chosen.masked_fill_(sums[rows] < best, index)
        torch.minimum(best, sums[rows], out=best)
        before = subset
    return chosen


def _vnm(scores: Tensor, pattern: VNM) -> Tensor:
    out, columns = scores.shape
    kept = top(_group(_tile_sums(scores, pattern.v), pattern.m), VNM_KEPT_COLUMNS)
    kept = kept.repeat_interleave(pattern.v, dim=0)[:out]
    candidates = _group(scores, pattern.m).masked_fill(~kept, -torch.inf)
    return _ungroup(top(candidates, pattern.n), columns)


def _block(scores: Tensor, pattern: Block) -> Tensor:
    out, columns = scores.shape
    sums = _block_sums(scores.double().square(), pattern)
    kept = largest(sums.view(1, -1), pattern.kept_blocks(out, columns)).view(sums.shape)
    mask = kept.repeat_interleave(pattern.rows, dim=0).repeat_interleave(pattern.cols, dim=1)
    return mask[:out, :columns].contiguous()


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
