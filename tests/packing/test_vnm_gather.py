"""V:N:M weights over their kept columns alone: against a slow twin, and exactly undone."""

from __future__ import annotations

import pytest
import torch

from sparsecomp.errors import PatternError
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.layouts.vnm import from_gathered, to_gathered
from sparsecomp.packing.quantize import quantize
from sparsecomp.patterns import VNM, parse

SHAPES = [(0, 16), (1, 1), (7, 33), (64, 128), (100, 50), (33, 1)]


def _weight(pattern: VNM, out: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Up to 4 columns of a group in use, up to 2 in a row; some tiles use fewer, and some rows none."""
    generator = torch.Generator().manual_seed(out + columns)
    dense = torch.zeros(out, columns)
    for first in range(0, out, pattern.v):
        for start in range(0, columns, pattern.m):
            wide = min(pattern.m, columns - start)
            used = torch.randperm(wide, generator=generator)[: int(torch.randint(0, 5, (1,), generator=generator))]
            for row in range(first, min(first + pattern.v, out)):
                for i in torch.randperm(len(used), generator=generator)[:2]:
                    dense[row, start + used[i]] = float(torch.randint(-3, 4, (1,), generator=generator))
    return dense.to(dtype)


def _slowly(dense: torch.Tensor, pattern: VNM) -> tuple[list[list[int]], torch.Tensor]:
    """The places of the kept columns, and the dense weight over those alone, one by one."""
    out, columns = dense.shape
    groups = -(-columns // pattern.m)
    places = [[0] * (4 * groups) for _ in range(-(-out // pattern.v))]
    gathered = torch.zeros(out, 4 * groups, dtype=dense.dtype)
    for tile, row in enumerate(places):
        rows = range(tile * pattern.v, min((tile + 1) * pattern.v, out))
        for group in range(groups):
            start = group * pattern.m
            used = [c for c in range(pattern.m) if start + c < columns and any(dense[r, start + c] != 0 for r in rows)]
            unused = [c for c in range(pattern.m) if c not in used]
            row[4 * group : 4 * group + 4] = sorted(used + unused[: 4 - len(used)])
            for i, place in enumerate(row[4 * group : 4 * group + 4]):
                for r in rows:
                    if start + place < columns:
                        gathered[r, 4 * group + i] = dense[r, start + place]
    return places, gathered


def _same(one: PackedWeight, other: PackedWeight) -> bool:
    parts = all(torch.equal(one.parts[name], other.parts[name]) for name in other.parts)
    return parts and (one.pattern, one.shape, one.dtype) == (other.pattern, other.shape, other.dtype)


@pytest.mark.parametrize("pattern", ["16:2:8", "64:2:8", "32:2:16", "3:2:16", "1:2:8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_slow_twin_and_comes_back(pattern: str, shape: tuple[int, int]) -> None:
    vnm = parse(pattern)
    assert isinstance(vnm, VNM)
    packed = pack(_weight(vnm, *shape, torch.float32), pattern)
    places, gathered = to_gathered(packed)
    wanted_places, wanted = _slowly(packed.unpack(), vnm)
    assert places.dtype == torch.uint8 and places.tolist() == wanted_places
    assert str(gathered.pattern) == "2:4" and torch.equal(gathered.unpack(), wanted)
    assert _same(from_gathered(places, gathered, vnm, shape), packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_other_types_come_back(dtype: torch.dtype) -> None:
    vnm = VNM(16, 2, 8)
    packed = pack(_weight(vnm, 40, 50, dtype), vnm)
    assert _same(from_gathered(*to_gathered(packed), vnm, packed.shape), packed)


def test_a_filler_that_the_canonical_form_puts_elsewhere() -> None:
    # rows without nonzeros have their free slots at places 0 and 1, which are none of the tile's four columns
    dense = torch.zeros(16, 8)
    dense[0, 4:6], dense[1, 6:8] = 1, 2
    packed = pack(dense, "16:2:8")
    places, gathered = to_gathered(packed)
    assert places.tolist() == [[4, 5, 6, 7]]
    assert torch.equal(gathered.unpack(), dense[:, 4:])
    assert _same(from_gathered(places, gathered, VNM(16, 2, 8), (16, 8)), packed)


def test_what_cannot_be_gathered_is_refused() -> None:
    with pytest.raises(PatternError, match="only V:N:M weights without scales can be gathered, not 2:4"):
        to_gathered(pack(torch.zeros(8, 8), "2:4"))
    with pytest.raises(PatternError, match="not int8 weights with scales"):
        to_gathered(quantize(pack(torch.zeros(16, 8), "16:2:8")))
