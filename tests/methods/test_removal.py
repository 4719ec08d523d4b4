"""Joint removal in a group against enumeration in float64."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.methods.removal import removal
from sparsecomp.patterns import parse
from sparsecomp.patterns.check import check_mask
from sparsecomp.patterns.subsets import subsets_of


def group_problem(out, size, seed):
    """c [out, M] and B [M, M]: the best values and the inverse of a group's H."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    x[:, 1:] += 0.7 * x[:, :-1]
    return torch.randn(out, size, generator=generator, dtype=torch.float64), torch.linalg.inv(x.T @ x / size)


def cost_of(values, inverse, dropped):
    """What forcing the columns ``dropped`` of one row to zero costs, from the definition."""
    columns = list(dropped)
    part = values[columns]
    return (part @ torch.linalg.inv(inverse[columns][:, columns]) @ part).item()


def row_masks(pattern, size):
    return list(combinations(range(size), pattern.m - pattern.n))


def least_cost(name, values, inverse):
    """The least cost of a group over all masks of the pattern, tile by tile."""
    pattern = parse(name)
    drops = row_masks(pattern, pattern.m)
    tile = {"v": getattr(pattern, "v", getattr(pattern, "mask_rows", 1)), "t": pattern.m}["t" if "@t" in name else "v"]
    total = 0.0
    for top in range(0, len(values), tile):
        rows = values[top : top + tile]
        table = [[cost_of(row, inverse, drop) for drop in drops] for row in rows]
        best = float("inf")
        if "@t" in name:
            for choice in product(range(len(drops)), repeat=tile):
                kept = [sum(column not in drops[index] for index in choice) for column in range(pattern.m)]
                if all(count == pattern.n for count in kept):
                    best = min(best, sum(costs[index] for costs, index in zip(table, choice, strict=False)))
        elif name.count(":") == 2:
            for columns in combinations(range(pattern.m), 4):
                inside = [i for i, drop in enumerate(drops) if set(range(pattern.m)) - set(drop) <= set(columns)]
                best = min(best, sum(min(costs[index] for index in inside) for costs in table))
        else:
            best = min(sum(costs[index] for costs in table) for index in range(len(drops)))
        total += best
    return total


def cost_of_mask(kept, values, inverse):
    return sum(
        cost_of(row, inverse, (~mask).nonzero().flatten().tolist()) for row, mask in zip(values, kept, strict=True)
    )


EXACT = ["1:2", "2:4", "1:4", "3:4", "2:8", "4:8", "2:4@v3", "4:8@v2", "3:2:8", "2:4@t", "1:4@t"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(EXACT), st.integers(1, 6), st.integers(0, 10**6))
def test_the_choice_is_the_best_of_all_masks(name, out, seed):
    pattern = parse(name)
    values, inverse = group_problem(out, pattern.m, seed)
    multipliers, kept = removal(pattern, inverse[None])(0, values.float())
    check_mask(kept, pattern)
    assert cost_of_mask(kept, values, inverse) == pytest.approx(least_cost(name, values, inverse), rel=1e-5)
    assert bool((multipliers[kept] == 0).all())
    moved = values - multipliers.double() @ inverse
    torch.testing.assert_close(moved[~kept], torch.zeros_like(moved[~kept]), rtol=0, atol=1e-4)


def test_two_of_sixteen_and_vnm_of_sixteen_are_still_exact():
    values, inverse = group_problem(3, 16, 0)
    for name in ("2:16", "14:16"):
        _, kept = removal(parse(name), inverse[None])(0, values.float())
        best = sum(min(cost_of(row, inverse, drop) for drop in row_masks(parse(name), 16)) for row in values)
        assert cost_of_mask(kept, values, inverse) == pytest.approx(best, rel=1e-5)
    _, kept = removal(parse("3:2:16"), inverse[None])(0, values.float())
    check_mask(kept, parse("3:2:16"))


def test_a_transposable_group_has_ninety_tiles():
    subsets = subsets_of(parse("2:4@t"))
    assert subsets.table.shape == (90, 4)
    tiles = subsets.kept[subsets.table]
    assert bool((tiles.sum(dim=1) == 2).all())
    assert bool((tiles.sum(dim=2) == 2).all())
    assert len({tuple(tile.flatten().tolist()) for tile in tiles}) == 90


@pytest.mark.parametrize("name", ["8:16", "5:16", "12:16", "8:16@v3"])
def test_greedy_removal_is_consistent_and_near_the_best(name):
    pattern = parse(name)
    values, inverse = group_problem(40, 16, 1)
    drop = removal(pattern, inverse[None])
    multipliers, kept = drop(0, values.float())
    check_mask(kept, pattern)
    moved = values - multipliers.double() @ inverse
    torch.testing.assert_close(moved[~kept], torch.zeros_like(moved[~kept]), rtol=0, atol=1e-3)
    assert bool((multipliers[kept] == 0).all())
    # swaps leave no tile where one exchange would gain, tested on the definition
    rows = pattern.mask_rows
    improved = 0
    for top in range(0, 6, rows):
        tile, mask = values[top : top + rows], kept[top : top + rows]
        now = cost_of_mask(mask, tile, inverse)
        for back, away in product((~mask[0]).nonzero().flatten(), mask[0].nonzero().flatten()):
            other = mask.clone()
            other[:, back], other[:, away] = True, False
            improved += cost_of_mask(other, tile, inverse) < 0.999 * now
    assert improved == 0


def test_greedy_removal_finds_nearly_the_best_of_12870_subsets():
    values, inverse = group_problem(20, 16, 2)
    _, kept = removal(parse("8:16"), inverse[None])(0, values.float())
    subsets = torch.tensor(list(combinations(range(16), 8)))
    blocks = torch.linalg.inv(inverse[subsets[:, :, None], subsets[:, None, :]])
    costs = torch.einsum("rpi,pij,rpj->rp", values[:, subsets], blocks, values[:, subsets])
    mine = cost_of_mask(kept, values, inverse)
    assert mine <= 1.15 * costs.min(dim=1).values.sum().item()


@pytest.mark.parametrize(("name", "out"), [("8:16", 20), ("8:16@v3", 20)])
def test_greedy_removal_never_leaves_a_start_for_a_worse_choice(name, out):
    pattern = parse(name)
    values, inverse = group_problem(out, 16, 3)
    start = torch.zeros(out, 16, dtype=torch.bool)
    start[:, ::2] = True
    _, kept = removal(pattern, inverse[None])(0, values.float(), start)
    for top in range(0, out, pattern.mask_rows):
        tile = slice(top, top + pattern.mask_rows)
        before, after = (cost_of_mask(mask[tile], values[tile], inverse) for mask in (start, kept))
        assert after <= before * (1 + 1e-4)
    check_mask(kept, pattern)
    # a start that no exchange improves comes back as it is, also in the last tile, which is short
    for _ in range(4):
        settled, (_, kept) = kept, removal(pattern, inverse[None])(0, values.float(), kept)
    assert torch.equal(settled, kept)
