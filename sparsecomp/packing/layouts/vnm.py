"""Canonical V:N:M weights <-> the columns that each tile of V rows keeps, and a 2:4 weight over those columns alone.

Pure functions on tensors, on any device. Knows nothing of kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import PatternError
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns import NM, VNM, VNM_KEPT_COLUMNS


def to_gathered(packed: PackedWeight) -> tuple[Tensor, PackedWeight]:
    """Places uint8 [ceil(out / V), 4 groups] of the kept columns, and the weight [out, 4 groups] of those, packed 2:4.

    Column 4g + i of the result is column M g + place[4g + i] of the weight, for all rows of a tile. Places ascend
    within a group; where rows use fewer than 4 columns, the first of the others fill up, and hold zeros.
    Raises PatternError for another pattern and for weights with scales.
    """
    pattern = packed.pattern
    if not isinstance(pattern, VNM) or packed.numbers.has_scales:
        what = f"{packed.numbers} weights with scales" if packed.numbers.has_scales else pattern
        raise PatternError(f"only V:N:M weights without scales can be gathered, not {what}; pack the weight otherwise")
    out, columns = packed.shape
    groups = pattern.row_pattern.groups(columns)
    tiles = -(-out // pattern.v)
    dense = functional.pad(packed.unpack(), (0, groups * pattern.m - columns, 0, tiles * pattern.v - out))
    dense = dense.view(tiles, pattern.v, groups, pattern.m)
    # a stable sort moves used columns to the front and leaves either kind in order
    order = (dense == 0).all(dim=1).to(torch.uint8).argsort(dim=2, stable=True)
    places = order[..., :VNM_KEPT_COLUMNS].sort(dim=2).values
    index = places[:, None].expand(tiles, pattern.v, groups, VNM_KEPT_COLUMNS)
    gathered = dense.gather(3, index).view(tiles * pattern.v, groups * VNM_KEPT_COLUMNS)[:out]
    return places.to(torch.uint8).flatten(1), pack(gathered, NM(pattern.n, VNM_KEPT_COLUMNS))


def from_gathered(places: Tensor, gathered: PackedWeight, pattern: VNM, shape: tuple[int, int]) -> PackedWeight:
    """The canonical form, byte for byte the one that ``to_gathered`` was given."""
    out, columns = shape
    groups, tiles = pattern.row_pattern.groups(columns), places.shape[0]
    kept = functional.pad(gathered.unpack(), (0, 0, 0, tiles * pattern.v - out))
    kept = kept.view(tiles, pattern.v, groups, VNM_KEPT_COLUMNS)
    index = places.view(tiles, 1, groups, VNM_KEPT_COLUMNS).to(torch.int64).expand_as(kept)
    dense = torch.zeros(tiles, pattern.v, groups, pattern.m, dtype=kept.dtype, device=kept.device)
    dense.scatter_(3, index, kept)
    return pack(dense.view(tiles * pattern.v, groups * pattern.m)[:out, :columns], pattern)
