"""One-pass methods and the refit against literal twins in float64."""

import pytest
import torch

from sparsecomp.methods.objective import objective
from sparsecomp.methods.obs import obs_sweep, sparsegpt_sweep, swept
from sparsecomp.methods.refit import refit
from sparsecomp.methods.weight import prune_weight
from sparsecomp.patterns import parse
from sparsecomp.patterns.check import check_mask
from sparsecomp.patterns.project import project
from tests.methods.problems import layer_of

PATTERNS = ["2:4", "1:4", "4:8", "8:16", "2:4@v4", "8:2:8", "2:4@t", "block4x4:0.5", "unstructured:0.5"]


def one_pass(layer, pattern, choose):
    """Columns from left to right with the inverse of what is left of H written out; ``choose`` makes each group's mask.

    ``choose(weights of the group, B of the group)`` gives its mask; weights left of the group stay as they are.
    """
    h = layer.gram.double()
    weight, size = layer.weight.double().clone(), pattern.m
    mask = torch.ones(weight.shape, dtype=torch.bool)
    joint = choose.__name__ == "exact"
    for group in range(0, weight.shape[1], size):
        inverse = torch.linalg.inv(h[group:, group:])
        last = min(group + size, weight.shape[1])
        kept = choose(weight[:, group:last], inverse[: last - group, : last - group], pattern)
        mask[:, group:last] = kept
        if joint:
            for row in range(len(weight)):
                dropped = (~kept[row]).nonzero().flatten()
                block = inverse[dropped][:, dropped]
                weight[row, group:] -= torch.linalg.solve(block, weight[row, group + dropped]) @ inverse[dropped]
            continue
        for column in range(group, last):
            inverse = torch.linalg.inv(h[column:, column:])
            error = weight[:, column] * ~kept[:, column - group] / inverse[0, 0]
            weight[:, column:] -= error[:, None] * inverse[0]
    return weight * mask, mask


def exact(weights, inverse, pattern):
    from sparsecomp.methods.removal import removal

    return removal(pattern, inverse[None])(0, weights.float())[1]


def ranked(weights, inverse, pattern):
    upper = torch.linalg.cholesky(inverse, upper=True)
    return project(weights.abs() / upper.diagonal(), pattern)


@pytest.mark.parametrize("name", ["2:4", "4:8", "8:16", "2:4@v4", "8:2:8"])
@pytest.mark.parametrize(("out", "columns"), [(6, 160), (1, 32), (5, 16)])
def test_passes_equal_their_definitions(name, out, columns):
    pattern = parse(name)
    layer = objective(*layer_of(out, columns))
    for sweep, choose in ((obs_sweep, exact), (sparsegpt_sweep, ranked)):
        weight, mask = sweep(layer, pattern)
        want, want_mask = one_pass(layer, pattern, choose)
        assert torch.equal(mask, want_mask)
        torch.testing.assert_close(weight.double(), want, rtol=0, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", PATTERNS)
def test_refit_solves_each_rows_least_squares(name):
    pattern = parse(name)
    layer = objective(*layer_of(9, 72))
    start, mask = swept(layer, pattern)
    check_mask(mask, pattern)
    weight, converged = refit(layer, start, mask, steps=300)
    assert converged
    h, dense = layer.gram.double(), layer.weight.double()
    for row in range(9):
        kept = mask[row].nonzero().flatten()
        best = torch.zeros(72, dtype=torch.float64)
        best[kept] = torch.linalg.solve(h[kept][:, kept], (dense[row] @ h)[kept])
        reached, least = (((v - dense[row]) @ h @ (v - dense[row])).item() for v in (weight[row].double(), best))
        assert least * (1 - 1e-6) <= reached <= least * 1.0005
    assert bool((weight[~mask] == 0).all())


def test_a_refit_that_is_cut_short_says_so_and_is_no_worse():
    layer = objective(*layer_of(9, 72, tokens=30))
    start, mask = swept(layer, parse("2:4"))
    weight, converged = refit(layer, start, mask, steps=1)
    assert not converged
    assert bool((layer.losses(weight) <= layer.losses(start)).all())


@pytest.mark.parametrize("name", ["2:4", "8:16", "block4x4:0.5", "unstructured:0.5"])
def test_a_users_mask_is_kept_and_its_weights_are_fitted(name):

    weight, gram = layer_of(8, 48)
    mask = project(torch.rand(8, 48, generator=torch.Generator().manual_seed(5)), parse(name))
    errors = {}
    for method in ("magnitude", "sparsegpt", "obs", "fast"):
        result = prune_weight(weight, name, method, gram, mask=mask)
        assert torch.equal(result.mask, mask)
        errors[method] = result.error
    assert errors["fast"] < min(errors["obs"], errors["magnitude"])
    assert errors["sparsegpt"] == errors["obs"]


@pytest.mark.parametrize("shape", [(8, 24), (7, 22), (1, 1)])
def test_blocks_that_go_are_those_that_cost_least(shape):
    pattern = parse("block3x5:0.5")
    layer = objective(*layer_of(*shape))
    _, mask = swept(layer, pattern)
    h, dense = layer.gram.double(), layer.weight.double()
    costs, kept = [], []
    for top in range(0, shape[0], 3):
        for left in range(0, shape[1], 5):
            part, block = dense[top : top + 3, left : left + 5], torch.linalg.inv(h[left:, left:])[:5, :5]
            costs.append(torch.trace(part @ torch.linalg.inv(block) @ part.T).item())
            kept.append(bool(mask[top, left]))
    assert sum(kept) == pattern.kept_blocks(*shape)
    assert max([cost for cost, keep in zip(costs, kept, strict=True) if not keep], default=0) <= min(
        cost for cost, keep in zip(costs, kept, strict=True) if keep
    )
