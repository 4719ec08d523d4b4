"""Masks of the largest against twins that compare all pairs, and sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecomp.patterns import parse
from sparsecomp.patterns.largest import largest, top
from sparsecomp.patterns.project import project
from sparsecomp.patterns.subsets import subsets_of

KINDS = ("drawn", "tied", "zeros", "infinite")


def numbers(shape: tuple[int, ...], kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if kind == "tied":
        return torch.randint(0, 3, shape, generator=generator).to(dtype)
    drawn = torch.randn(shape, generator=generator).to(dtype)
    return drawn.masked_fill(drawn < 0, -torch.inf) if kind == "infinite" else drawn


def slow_top(groups: Tensor, count: int) -> Tensor:
    """Kept is what fewer than ``count`` others beat, an equal one before it beating it too."""
    size = groups.shape[-1]
    rank = torch.zeros(groups.shape, dtype=torch.int64)
    for here in range(size):
        for other in range(size):
            mine, its = groups[..., here], groups[..., other]
            rank[..., here] += its > mine if other >= here else its >= mine
    return rank < count


def slow_largest(rows: Tensor, count: int) -> Tensor:
    order = rows.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([2, 4, 8, 16]), st.integers(1, 16), st.integers(0, 9), st.sampled_from(KINDS), st.integers(0, 99)
)
def test_groups_against_all_pairs(size: int, count: int, rows: int, kind: str, seed: int) -> None:
    groups = numbers((rows, 5, size), kind, seed)
    assert torch.equal(top(groups, min(count, size)), slow_top(groups, min(count, size)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_other_numbers(dtype: torch.dtype, kind: str) -> None:
    groups = numbers((40, 16), kind, 3, dtype)
    for count in range(1, 17):
        assert torch.equal(top(groups, count), slow_top(groups, count))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 7), st.integers(0, 40), st.integers(0, 45), st.sampled_from(KINDS), st.integers(0, 99))
def test_rows_against_a_sort(rows: int, columns: int, count: int, kind: str, seed: int) -> None:
    scores = numbers((rows, columns), kind, seed)
    assert torch.equal(largest(scores, min(count, columns)), slow_largest(scores, min(count, columns)))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["1:2@t", "2:2@t", "1:4@t", "2:4@t", "3:4@t", "4:4@t"]),
    st.integers(0, 13),
    st.integers(0, 13),
    st.booleans(),
    st.integers(0, 99),
)
def test_transposable_tiles_against_their_table(name: str, out: int, columns: int, tied: bool, seed: int) -> None:
    pattern = parse(name)
    scores = numbers((out, columns), "tied" if tied else "drawn", seed).abs()
    subsets = subsets_of(pattern)
    assert subsets is not None and subsets.table is not None
    m = subsets.kept.shape[1]
    patterns = subsets.kept[subsets.table].double()  # [patterns, row, column]
    want = torch.zeros(out, columns, dtype=torch.bool)
    squares = torch.nn.functional.pad(scores.double().square(), (0, -columns % m, 0, -out % m))
    for down in range(0, out, m):
        for left in range(0, columns, m):
            lost = ((1 - patterns) * squares[down : down + m, left : left + m]).sum(dim=2)
            total = lost[:, 0].clone()
            for row in range(1, m):
                total += lost[:, row]
            best = patterns[int(total.argmin())].bool()
            want[down : down + m, left : left + m] = best[: out - down, : columns - left]
    assert torch.equal(project(scores, pattern), want)
