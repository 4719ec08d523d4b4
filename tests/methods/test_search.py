"""ADMM and coordinate descent against literal twins in float64, and what the presets promise."""

import sys
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch

from sparsecomp.methods.admm import Schedule, admm
from sparsecomp.methods.descent import descend
from sparsecomp.methods.error import relative_error
from sparsecomp.methods.objective import objective
from sparsecomp.methods.obs import swept
from sparsecomp.methods.presets import DAMPINGS
from sparsecomp.methods.refit import refit
from sparsecomp.methods.registry import get_method, methods
from sparsecomp.methods.weight import prune_weight
from sparsecomp.patterns import NM, parse
from sparsecomp.patterns.check import check_mask
from sparsecomp.patterns.project import project
from tests.methods.problems import layer_of

GROUPED = ["2:4", "1:4", "4:8", "8:16", "2:16", "2:4@v4", "8:16@v3", "8:2:8", "2:4@t"]
PATTERNS = [*GROUPED, "block4x4:0.5", "unstructured:0.5"]
SEARCHES = [name for name in methods() if not get_method(name).only_chooses]


def loss_of(layer, weight):
    return layer.losses(weight).sum().item()


@pytest.mark.parametrize("name", ["2:4", "8:16@v3", "unstructured:0.3", "block4x4:0.5"])
def test_admm_takes_the_steps_of_its_definition(name):
    pattern, schedule = parse(name), Schedule(start=0.1, growth=1.5, every=2, steps=9)
    layer = objective(*layer_of(10, 40))
    weight, mask, _ = admm(layer, pattern, schedule)
    h, dense = layer.gram.double(), layer.weight.double()
    masked = dense * project(dense.abs(), pattern)
    dual, rho = torch.zeros_like(dense), schedule.start
    for step in range(schedule.steps):
        if step and step % schedule.every == 0:
            rho *= schedule.growth
        free = torch.linalg.solve(h + rho * torch.eye(40), dense @ h - dual + rho * masked, left=False)
        proposal = free + dual / rho
        masked = proposal * project(proposal.abs(), pattern)
        dual = dual + rho * (free - masked)
    assert torch.equal(mask, masked != 0)
    torch.testing.assert_close(weight.double(), masked, rtol=0, atol=1e-4)


def test_admm_says_whether_the_mask_settled():
    layer = objective(*layer_of(10, 40))
    assert not admm(layer, parse("2:4"), Schedule(steps=10))[2]
    weight, mask, settled = admm(layer, parse("2:4"))
    assert settled
    again, same, _ = admm(layer, parse("2:4"))
    assert torch.equal(weight, again)
    assert torch.equal(mask, same)


def best_group(values, h, dense, columns, n):
    """The least loss of one row over all masks and values of one group, the rest fixed."""
    others = [column for column in range(len(dense)) if column not in columns]
    best = None
    for kept in combinations(columns, n):
        kept = list(kept)
        trial = values.clone()
        trial[columns] = 0.0
        pull = dense @ h[:, kept] - trial[others] @ h[others][:, kept]
        trial[kept] = torch.linalg.solve(h[kept][:, kept], pull)
        loss = ((trial - dense) @ h @ (trial - dense)).item()
        if best is None or loss < best[0]:
            best = loss, trial
    return best[1]


@pytest.mark.parametrize("name", ["2:4", "1:4", "4:8"])
def test_a_pass_of_descent_solves_group_after_group(name):
    pattern = parse(name)
    layer = objective(*layer_of(4, 16))
    start, mask = swept(layer, pattern)
    h, dense = layer.gram.double(), layer.weight.double()
    want = start.double().clone()
    for row in range(4):
        for first in range(0, 16, pattern.m):
            columns = list(range(first, first + pattern.m))
            want[row] = best_group(want[row], h, dense[row], columns, pattern.n)
    weight, kept = descend(layer, start, mask, pattern, sweeps=1)
    assert torch.equal(kept, want != 0)
    torch.testing.assert_close(weight.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("columns", [272, 37])
def test_descent_never_raises_the_loss(name, columns):
    pattern = parse(name)
    layer = objective(*layer_of(13, columns, tokens=300))
    weight, mask = swept(layer, pattern)
    losses = [loss_of(layer, weight)]
    for _ in range(3):
        weight, mask = descend(layer, weight, mask, pattern, sweeps=1)
        check_mask(mask, pattern)
        assert bool((weight[~mask] == 0).all())
        losses.append(loss_of(layer, weight))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]
    # passes in one call alternate in direction, and are as many as asked for
    one, three = (descend(layer, *swept(layer, pattern), pattern, sweeps=count)[0] for count in (1, 3))
    assert loss_of(layer, three) < 0.995 * loss_of(layer, one)


@pytest.mark.parametrize("name", PATTERNS)
def test_each_step_up_is_worth_it(name):
    weight, gram = layer_of(48, 96)
    errors = {}
    for method in ("wanda", "ria", "sparsegpt", "obs", "fast", "admm", "balanced"):
        result = prune_weight(weight, name, method, gram)
        check_mask(result.mask, parse(name))
        assert bool((result.weight[~result.mask] == 0).all())
        assert result.notes == ()
        errors[method] = result.error
    assert errors["sparsegpt"] < errors["wanda"]
    assert errors["fast"] < min(errors["obs"], errors["sparsegpt"])
    assert errors["balanced"] < errors["fast"]
    assert errors["balanced"] <= errors["admm"] * 1.001


@pytest.mark.parametrize("name", ["2:4", "2:4@v3", "8:2:8", "2:4@t", "block4x4:0.5"])
def test_balanced_is_nowhere_worse_than_fast(name):
    weight, gram = layer_of(31, 40, tokens=60)
    layer = objective(weight, gram)
    results = [prune_weight(weight, name, method, gram) for method in ("fast", "balanced")]
    fast, balanced = (layer.losses((result.weight * layer.scale).float()) for result in results)
    tile = {"2:4@v3": 3, "8:2:8": 8, "2:4@t": 4, "block4x4:0.5": 31}.get(name, 1)
    for top in range(0, 31, tile):
        assert balanced[top : top + tile].sum() <= fast[top : top + tile].sum() * (1 + 1e-4)


def test_best_takes_the_damping_that_held_out_tokens_prefer():
    weight, gram = layer_of(16, 64, seed=0, tokens=80)
    held_out = layer_of(16, 64, seed=0, tokens=500)[1]
    result = prune_weight(weight, "2:4", "best", gram, held_out=held_out)
    tried = []
    for damping in DAMPINGS:
        layer = objective(weight, gram, damping)
        start, mask = swept(layer, parse("2:4"))
        other = layer.unscale(refit(layer, start, mask)[0]).float()
        tried.append(relative_error(weight, other, held_out))
    assert relative_error(weight, result.weight, held_out) < min(tried)
    assert relative_error(weight, result.weight, held_out) <= relative_error(
        weight, prune_weight(weight, "2:4", "balanced", gram).weight, held_out
    )
    assert "the least held-out error" in result.notes[-1]
    # on the very tokens of the calibration no damping is much better than another
    kept = prune_weight(weight, "2:4", "best", held_out, held_out=held_out)
    assert torch.equal(kept.weight, prune_weight(weight, "2:4", "balanced", held_out).weight)
    assert "damping 0.01 gave" in kept.notes[-1] and "no other 0.2% less" in kept.notes[-1]
    plain = prune_weight(weight, "2:4", "best", gram)
    assert torch.equal(plain.weight, prune_weight(weight, "2:4", "balanced", gram).weight)
    assert plain.notes == ("no held-out tokens were given, so the damping stayed at 0.01",)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("name", ["2:4", "8:16", "64:2:8", "block4x4:0.5", "unstructured:0.4", "4:4"])
@pytest.mark.parametrize("shape", [(5, 13), (1, 1), (0, 8), (4, 0)])
def test_any_shape(method, name, shape):
    result = prune_weight(*layer_of(*shape, tokens=20)[:1], name, method, layer_of(*shape, tokens=20)[1])
    assert result.weight.shape == shape
    check_mask(result.mask, parse(name))
    if isinstance(result.pattern, NM) and result.pattern.density == 1.0:
        assert result.error < 1e-6


@pytest.mark.parametrize("method", SEARCHES)
def test_same_input_same_bits(method):
    weight, gram = layer_of(24, 64)
    first, second = (prune_weight(weight.clone(), "2:4", method, gram.clone()) for _ in range(2))
    assert torch.equal(first.weight, second.weight)


def test_all_of_them_are_registered():
    assert {"sparsegpt", "obs", "fast", "admm", "balanced", "best"} <= set(SEARCHES)


def test_what_did_not_settle_is_said_and_the_best_is_kept(monkeypatch):
    presets = sys.modules["sparsecomp.methods.presets"]
    weight, gram = layer_of(24, 64)
    monkeypatch.setattr(presets, "admm", partial(admm, schedule=Schedule(steps=2)))
    monkeypatch.setattr(presets, "refit", lambda layer, weight, mask, steps=1, **_: refit(layer, weight, mask, steps))
    result = prune_weight(weight, "2:4", "balanced", gram)
    assert [note.split()[1] for note in result.notes] == ["refit", "ADMM"]
    check_mask(result.mask, parse("2:4"))
    monkeypatch.undo()
    assert result.error < prune_weight(weight, "2:4", "sparsegpt", gram).error


def test_rows_that_admm_made_worse_keep_their_start():
    presets = sys.modules["sparsecomp.methods.presets"]
    layer = objective(*layer_of(8, 16))
    good, mask = swept(layer, parse("2:4"))
    bad, other = good.clone(), mask.clone()
    bad[[1, 6]], other[[1, 6]] = 0.0, False
    better, same = layer.weight * (layer.weight.abs() > 0), torch.ones_like(mask)
    bad[3], other[3] = better[3], same[3]
    start, found = (presets.Solution(*each) for each in ((good, mask), (bad, other)))
    for name, rows in (("2:4", [3]), ("2:4@v2", [3]), ("2:4@v4", []), ("2:4@t", []), ("block4x4:0.5", [])):
        result = presets._best_of_rows(layer, parse(name), start, found)
        taken = [row for row in range(8) if not torch.equal(result.weight[row], good[row])]
        assert taken == rows, name
