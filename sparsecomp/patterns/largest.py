"""The largest numbers of every small group or row, as a mask, without sorting: find the least that is kept, compare.

Takes tensors and counts. Knows no patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def top(groups: Tensor, count: int) -> Tensor:
    """True for the ``count`` largest of the last dimension, whose size is a power of two; ties to the lower index.

    Numbers may be infinite, and none is NaN.
    """
    if groups.numel() == 0 or count >= groups.shape[-1]:
        return torch.ones_like(groups, dtype=torch.bool)
    # position by position, so that every comparison runs along contiguous memory
    planes = groups.movedim(-1, 0).contiguous()
    kept = planes >= _nth(list(planes), count)
    if int(kept.count_nonzero()) != count * (planes.numel() // len(planes)):
        tied = kept.sum(dim=0, dtype=torch.uint8) > count
        kept[:, tied] = _first_of_equals(planes[:, tied], count)
    return kept.movedim(0, -1)


def largest(rows: Tensor, count: int) -> Tensor:
    """True for the ``count`` largest of every row [rows, columns], ties to the lower column; none is NaN."""
    columns = rows.shape[1]
    if rows.numel() == 0 or count >= columns:
        return torch.ones_like(rows, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    least = rows.kthvalue(columns - count + 1, dim=1, keepdim=True).values
    kept = rows >= least
    tied = kept.sum(dim=1) > count
    if bool(tied.any()):
        some = rows[tied]
        above = some > least[tied]
        equal = some == least[tied]
        room = count - above.sum(dim=1, keepdim=True)
        kept[tied] = above | (equal & (equal.cumsum(dim=1) <= room))
    return kept


def _nth(planes: Sequence[Tensor], count: int) -> Tensor:
    """The ``count``-th largest of 2, 4, 8, ... planes, element by element, 0 < count < their number.

    Of two sorted halves a and b it is the largest min(a_i, b_j) with i + j = count, where a_0 and b_0 are infinite.
    """
    half = len(planes) // 2
    first, second = _descending(planes[:half]), _descending(planes[half:])
    found: Tensor | None = None
    for ahead in range(max(0, count - half), min(count, half) + 1):
        behind = count - ahead
        if ahead == 0:
            least = second[behind - 1]
        elif behind == 0:
            least = first[ahead - 1]
        else:
            least = torch.minimum(first[ahead - 1], second[behind - 1])
        found = least if found is None else torch.maximum(found, least)
    assert found is not None
    return found


def _descending(planes: Sequence[Tensor]) -> list[Tensor]:
    """The planes sorted element by element, the largest first."""
    held = list(planes)
    for low, high in _exchanges(len(held)):
        held[low], held[high] = torch.maximum(held[low], held[high]), torch.minimum(held[low], held[high])
    return held


@lru_cache
def _exchanges(count: int) -> tuple[tuple[int, int], ...]:
    """The comparators of odd-even merge sort (Batcher 1968) for a power of two: merge halves that are sorted."""
    if count == 1:
        return ()
    half = _exchanges(count // 2)
    upper = tuple((low + count // 2, high + count // 2) for low, high in half)
    return half + upper + _merge(0, count, 1)


def _merge(start: int, count: int, step: int) -> tuple[tuple[int, int], ...]:
    """The comparators that merge the two sorted halves of every ``step``-th of ``count`` places from ``start`` on."""
    wide = 2 * step
    if wide >= count:
        return ((start, start + step),)
    inner = tuple((place, place + step) for place in range(start + step, start + count - step, wide))
    return _merge(start, count, wide) + _merge(start + step, count, wide) + inner


def _first_of_equals(planes: Tensor, count: int) -> Tensor:
    """As ``top`` for planes [size, groups] where several equal the least that is kept."""
    least = _nth(list(planes), count)
    above, equal = planes > least, planes == least
    room = count - above.sum(dim=0, dtype=torch.int8)
    return above | (equal & (equal.cumsum(dim=0, dtype=torch.int8) <= room))
