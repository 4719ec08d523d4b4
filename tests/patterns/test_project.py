import re
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.errors import PatternError
from sparsecomp.patterns import GROUP_SIZES, NM, VNM, Block, Unstructured, parse
from sparsecomp.patterns.check import breach, check_mask, check_weight
from sparsecomp.patterns.project import project

EVERY_NM = [(n, m) for m in GROUP_SIZES for n in range(1, m + 1)]
SIDES = st.integers(0, 37)


def scores_of(out, columns, seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 3, (out, columns), generator=generator).float()
    return torch.rand(out, columns, generator=generator)


def slow_nm(scores, n, m, rows):
    """The definition: for each tile and group, the subset with the largest sum of squares, first in order."""
    out, columns = scores.shape
    mask = torch.zeros(out, columns, dtype=torch.bool)
    energy = scores.double().square()
    for top, left in product(range(0, out, rows), range(0, columns, m)):
        group = energy[top : top + rows, left : left + m].sum(dim=0)
        subsets = combinations(range(len(group)), min(n, len(group)))
        best = max(subsets, key=lambda subset: (group[list(subset)].sum().item(), [-column for column in subset]))
        for column in best:
            mask[top : top + rows, left + column] = True
    return mask


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EVERY_NM), st.integers(1, 5), SIDES, SIDES, st.booleans(), st.integers(0, 10**6))
def test_nm_counts_per_group(nm, rows, out, columns, ties, seed):
    n, m = nm
    pattern = NM(n, m, rows)
    mask = project(scores_of(out, columns, seed, ties), pattern)
    assert mask.shape == (out, columns)
    assert mask.dtype == torch.bool
    for left in range(0, columns, m):
        group = mask[:, left : left + m]
        assert bool((group.sum(dim=1) == min(n, group.shape[1])).all())
    for top in range(0, out, rows):
        assert bool((mask[top : top + rows] == mask[top]).all())
    check_mask(mask, pattern)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([nm for nm in EVERY_NM if nm[1] <= 8]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 19),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_nm_is_the_best_of_all_subsets_and_ties_go_to_the_lower_column(nm, rows, out, columns, ties, seed):
    scores = scores_of(out, columns, seed, ties)
    got, want = project(scores, NM(*nm, rows)), slow_nm(scores, *nm, rows)
    if ties:
        assert torch.equal(got, want)
    torch.testing.assert_close((scores.double() * got).square().sum(), (scores.double() * want).square().sum())


def test_sixteen_columns_against_all_12870_subsets():
    scores = scores_of(2, 16, 0)
    assert torch.equal(project(scores, NM(8, 16)), slow_nm(scores, 8, 16, 1))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([8, 16]), st.integers(1, 6), SIDES, SIDES, st.integers(0, 10**6))
def test_vnm_keeps_the_four_best_columns_of_a_tile_and_two_of_them_in_a_row(m, v, out, columns, seed):
    scores = scores_of(out, columns, seed)
    pattern = VNM(v, 2, m)
    mask = project(scores, pattern)
    check_mask(mask, pattern)
    energy = scores.double().square()
    for top, left in product(range(0, out, v), range(0, columns, m)):
        tile = energy[top : top + v, left : left + m]
        four = tile.sum(dim=0).argsort(descending=True)[:4]
        for row in range(tile.shape[0]):
            two = four[tile[row, four].argsort(descending=True)[:2]]
            assert set(mask[top + row, left : left + m].nonzero().flatten().tolist()) == set(two.tolist())


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 1.0), SIDES, SIDES, st.integers(0, 10**6))
def test_blocks_with_the_largest_sums_are_kept_whole(rows, cols, keep, out, columns, seed):
    scores = scores_of(out, columns, seed)
    pattern = Block(rows, cols, keep)
    mask = project(scores, pattern)
    check_mask(mask, pattern)
    kept, dropped = [], []
    for top, left in product(range(0, out, rows), range(0, columns, cols)):
        block = mask[top : top + rows, left : left + cols]
        assert bool((block == block[0, 0]).all())
        energy = scores[top : top + rows, left : left + cols].double().square().sum().item()
        (kept if block[0, 0] else dropped).append(energy)
    assert len(kept) == pattern.kept_blocks(out, columns)
    assert min(kept, default=0.0) >= max(dropped, default=0.0) or not kept


@settings(max_examples=80, deadline=None)
@given(st.floats(0.01, 1.0), SIDES, SIDES, st.booleans(), st.integers(0, 10**6))
def test_unstructured_keeps_the_largest_of_each_row(keep, out, columns, ties, seed):
    scores = scores_of(out, columns, seed, ties)
    pattern = Unstructured(keep)
    mask = project(scores, pattern)
    check_mask(mask, pattern)
    for row in range(out):
        order = sorted(range(columns), key=lambda column: (-scores[row, column].item(), column))
        assert set(mask[row].nonzero().flatten().tolist()) == set(order[: pattern.kept_per_row(columns)])


def test_ties_are_broken_by_the_lower_column_everywhere():
    ones = torch.ones(4, 8)
    assert project(ones, parse("2:4")).nonzero()[:4, 1].tolist() == [0, 1, 4, 5]
    assert project(ones, parse("2:4@v4")).nonzero()[:4, 1].tolist() == [0, 1, 4, 5]
    assert project(ones, parse("4:2:8")).nonzero()[:2, 1].tolist() == [0, 1]
    assert project(ones, parse("unstructured:0.25")).nonzero()[:2, 1].tolist() == [0, 1]
    block = project(ones, parse("block2x4:0.5"))
    assert bool(block[:2].all())
    assert not bool(block[2:].any())


def test_sums_do_not_lose_scores_whose_squares_leave_float32():
    scores = torch.tensor([[1e-30, 2e-30, 3e-30, 4e-30], [1e30, 2e30, 3e30, 4e30]])
    assert project(scores[:1], NM(2, 4, 2)).tolist() == [[False, False, True, True]]
    assert project(scores[1:], NM(2, 4, 2)).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("pattern", "kept", "message"),
    [
        (
            "2:4",
            [(1, 4), (1, 5), (1, 6)],
            r"in row 1, group 1 \(columns 4 to 7\): 3 weights kept, at most 2 allowed; 1 of 9 groups",
        ),
        (
            "1:4",
            [(2, 8), (2, 9)],
            r"in row 2, group 2 \(columns 8 to 9\): 2 weights kept, at most 1 allowed",
        ),
        ("1:2@v3", [(0, 0), (2, 1)], r"breaks 1:2@v3 in rows 0 to 2 together, group 0 \(columns 0 to 1\): 2 weights"),
        ("3:2:8", [(row, 2 * row + i) for row in range(3) for i in range(2)], "rows 0 to 2 together.*6 columns in use"),
        ("3:2:8", [(0, 0), (0, 1), (0, 2)], r"breaks 3:2:8 in row 0, group 0 \(columns 0 to 7\): 3 weights kept"),
        ("block2x2:0.1", [(0, 0), (2, 9)], "breaks block2x2:0.1 in its 10 blocks: 2 in use, at most 1 allowed"),
        ("unstructured:0.1", [(1, 0), (1, 9)], "breaks unstructured:0.1 in row 1, columns 0 to 9: 2 weights kept"),
    ],
)
def test_a_mask_that_breaks_its_pattern_is_named(pattern, kept, message):
    mask = torch.zeros(3, 10, dtype=torch.bool)
    for row, column in kept:
        mask[row, column] = True
    with pytest.raises(PatternError, match=message):
        check_mask(mask, parse(pattern))
    row, column = kept[-1]
    mask[row, column] = False
    if len(kept) < 6:
        check_mask(mask, parse(pattern))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["1:2@t", "1:4@t", "2:4@t", "3:4@t"]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6)
)
def test_a_transposable_mask_is_the_best_tile_by_tile(name, out, columns, seed):
    pattern = parse(name)
    scores = scores_of(out, columns, seed)
    mask = project(scores, pattern)
    check_mask(mask, pattern)
    check_mask(mask.T.contiguous(), NM(pattern.n, pattern.m))
    m = pattern.m
    energy = torch.zeros(-(-out // m) * m, -(-columns // m) * m, dtype=torch.float64)
    energy[:out, :columns] = scores.double().square()
    row_masks = [torch.tensor([j in kept for j in range(m)]) for kept in combinations(range(m), pattern.n)]
    tiles = [torch.stack(rows) for rows in product(row_masks, repeat=m)]
    tiles = [tile for tile in tiles if bool((tile.sum(dim=0) == pattern.n).all())]
    best = sum(
        max((energy[top : top + m, left : left + m] * tile).sum().item() for tile in tiles)
        for top, left in product(range(0, out, m), range(0, columns, m))
    )
    assert (scores.double().square() * mask).sum().item() == pytest.approx(best)


def test_a_mask_that_is_not_transposable_names_the_column():
    mask = torch.zeros(8, 4, dtype=torch.bool)
    mask[4:7, 2] = True
    with pytest.raises(PatternError, match="in column 2, rows 4 to 7: 3 weights kept, at most 2 allowed"):
        check_mask(mask, parse("2:4@t"))


def obeys(mask, pattern):
    """The definition, group by group."""
    if isinstance(pattern, Unstructured):
        return all(row.sum() <= pattern.kept_per_row(mask.shape[1]) for row in mask)
    if isinstance(pattern, Block):
        blocks = [b for rows in mask.split(pattern.rows) for b in rows.split(pattern.cols, dim=1)]
        return sum(bool(b.any()) for b in blocks) <= pattern.kept_blocks(*mask.shape)
    rows = pattern.v if isinstance(pattern, VNM) else pattern.mask_rows
    for tile in mask.split(rows):
        for group in tile.split(pattern.m, dim=1):
            shared = int(group.any(dim=0).sum())
            each = int(group.sum(dim=1).max())
            if (shared > 4 or each > pattern.n) if isinstance(pattern, VNM) else shared > pattern.n:
                return False
    if isinstance(pattern, NM) and pattern.transposable:
        return all(int(tile.sum(dim=0).max()) <= pattern.n for tile in mask.split(pattern.m))
    return True


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["2:4", "3:8", "2:4@v2", "2:4@t", "3:2:8", "block2x4:0.5", "unstructured:0.5"])
def test_the_check_is_the_definition_and_the_same_for_arrays_weights_and_masks(name, seed):
    generator = torch.Generator().manual_seed(seed)
    out, columns = (int(torch.randint(1, 14, (), generator=generator)) for _ in range(2))
    pattern = parse(name)
    scores = torch.rand(out, columns, generator=generator)
    # masks that obey, but for some that keep one weight more
    mask = project(scores, pattern)
    if seed % 2:
        mask[int(torch.randint(0, out, (), generator=generator)), seed % columns] = True
    found = breach(mask, pattern)
    assert (found is None) == obeys(mask, pattern)
    assert breach(mask.numpy(), pattern) == found
    if found is None:
        check_mask(mask, pattern)
        check_weight(-scores * mask, pattern)
        return
    with pytest.raises(PatternError, match=re.escape(f"the mask breaks {name} in {found}; keep fewer")):
        check_mask(mask, pattern)
    told = breach(mask, pattern, "nonzeros")
    with pytest.raises(PatternError, match=re.escape(f"weight breaks {name} in {told}; prune it first")):
        check_weight((scores + 1) * mask, pattern)
