"""Which columns of a group can be dropped together, and how rows that share a choice agree on one.

Takes patterns and costs, gives indexes. Knows nothing of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import comb

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.patterns import NM, VNM, VNM_KEPT_COLUMNS

# beyond this many subsets of a group, removal is greedy with swaps: 8:16 has 12870
MOST_SUBSETS = 256
_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Subsets:
    """All P ways to drop s columns of a group in one row: ``dropped`` int64 [P, s], ``kept`` bool [P, M].

    ``rows`` rows form a tile. ``table`` is what ties them: for V:N:M, int64 [column sets, subsets inside them]; for a
    transposable pattern, int64 [tile patterns, rows]; None where they all take the same subset.
    """

    pattern: NM | VNM
    dropped: Tensor
    kept: Tensor
    rows: int
    table: Tensor | None = None

    def choose(self, cost: Tensor) -> Tensor:
        """The subset of each row, int64 [out], that makes ``cost`` [out, P] least in total over every tile of rows."""
        if self.rows == 1:
            return cost.argmin(dim=1)
        out = cost.shape[0]
        tiles = functional.pad(cost, (0, 0, 0, -out % self.rows)).view(-(-out // self.rows), self.rows, cost.shape[1])
        if self.table is None:
            return tiles.sum(dim=1).argmin(dim=1).repeat_interleave(self.rows)[:out]
        table = self.table.to(cost.device)
        chosen = _columns(tiles, table) if isinstance(self.pattern, VNM) else _tile_patterns(tiles, table)
        return chosen.flatten()[:out]


@lru_cache(maxsize=64)
def subsets_of(pattern: NM | VNM) -> Subsets | None:
    """The subsets of a group of ``pattern``, or None if there are too many to try."""
    count = pattern.m - pattern.n
    if comb(pattern.m, count) > MOST_SUBSETS:
        return None
    dropped = list(combinations(range(pattern.m), count))
    kept = torch.ones(len(dropped), pattern.m, dtype=torch.bool, device="cpu")
    for index, columns in enumerate(dropped):
        kept[index, list(columns)] = False
    indexes = torch.tensor(dropped, dtype=torch.int64, device="cpu").view(len(dropped), count)
    if isinstance(pattern, VNM):
        return Subsets(pattern, indexes, kept, pattern.v, _subsets_of_columns(pattern, kept))
    if pattern.transposable:
        return Subsets(pattern, indexes, kept, pattern.m, _transposable_tiles(pattern, kept))
    return Subsets(pattern, indexes, kept, pattern.mask_rows)


def _subsets_of_columns(pattern: VNM, kept: Tensor) -> Tensor:
    """For every set of columns a tile may keep, the subsets that keep nothing outside it."""
    keeps = [frozenset(row.nonzero().flatten().tolist()) for row in kept]
    column_sets = combinations(range(pattern.m), VNM_KEPT_COLUMNS)
    allowed = [[i for i, keep in enumerate(keeps) if keep <= set(columns)] for columns in column_sets]
    return torch.tensor(allowed, dtype=torch.int64, device="cpu")


def _transposable_tiles(pattern: NM, kept: Tensor) -> Tensor:
    """Every M x M tile that keeps N in each row and in each column, as the subset of each row: 90 for 2:4."""
    tiles = torch.tensor(list(product(range(len(kept)), repeat=pattern.m)), dtype=torch.int64, device="cpu")
    columns = kept[tiles].sum(dim=1)  # [tiles, M]
    return tiles[(columns == pattern.n).all(dim=1)]


def _columns(tiles: Tensor, table: Tensor) -> Tensor:
    """V:N:M: a tile keeps the columns that leave the least cost when each row then takes its best subset of them."""
    tile_count, rows, _ = tiles.shape
    chosen = []
    for part in torch.split(tiles, max(1, _ELEMENTS // (rows * table.numel()))):
        cost, position = part[:, :, table].min(dim=3)  # [tiles, rows, column sets]
        best = cost.sum(dim=1).argmin(dim=1)
        row = position.gather(2, best[:, None, None].expand(-1, rows, 1)).squeeze(2)
        chosen.append(table[best[:, None], row])
    return torch.cat(chosen) if tile_count else table.new_zeros(0, rows)


def _tile_patterns(tiles: Tensor, table: Tensor) -> Tensor:
    """The subsets [tiles, rows] of the tile pattern with the least total cost."""
    total = torch.zeros(tiles.shape[0], table.shape[0], dtype=tiles.dtype, device=tiles.device)
    for row in range(tiles.shape[1]):
        total += tiles[:, row, table[:, row]]
    return table[total.argmin(dim=1)]
