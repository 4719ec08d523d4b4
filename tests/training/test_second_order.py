"""Diagonal and blocks of the empirical Fisher matrix against sums and least squares that are written out."""

import copy
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tests.training.toys as toys
from sparsecomp.errors import MethodError, PatternError
from sparsecomp.patterns import parse
from sparsecomp.patterns.project import project
from sparsecomp.training import Schedule, sparsify
from sparsecomp.training.fisher import Fisher, block_width, fold, from_blocks, to_blocks
from sparsecomp.training.rules.second_order import Obd, Obs


def written_out(gradients, kept, damp):
    """F of each block as the definition says, float64, with zeros for what is not kept."""
    count, blocks, width = gradients.shape
    wide = gradients.double() * kept
    mean = float((wide.square().sum(dim=0) / count).sum() / kept.sum())
    matrices = torch.zeros(blocks, width, width, dtype=torch.float64)
    for block in range(blocks):
        for each in wide[:, block]:
            matrices[block] += torch.outer(each, each) / count
        matrices[block] += damp * mean * torch.diag(kept[block].double())
    return matrices


def drawn(seed, count, blocks, width, density=0.7):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, blocks, width, generator=generator)
    weight = torch.randn(blocks, width, generator=generator)
    kept = torch.rand(blocks, width, generator=generator) < density
    left = kept & (torch.rand(blocks, width, generator=generator) < 0.6)
    kept[0], left[0] = True, False  # one that loses all, one that has nothing, one that loses nothing
    if blocks > 2:
        kept[1] = left[1] = False
        left[2] = kept[2]
    return gradients, weight, kept, left


def fisher(gradients, kept, damp, folded):
    if not folded:
        return Fisher(gradients, None, len(gradients), kept, damp)
    total = torch.zeros(*kept.shape, kept.shape[1])
    fold(total, gradients[:folded])
    return Fisher(gradients[folded:], total, len(gradients), kept, damp)


PROBLEMS = given(
    st.integers(0, 1000), st.integers(1, 12), st.integers(1, 6), st.integers(1, 9), st.sampled_from([0, 0, 1, 3])
)


@settings(max_examples=60, deadline=None)
@PROBLEMS
def test_what_a_weight_costs_is_that_of_the_inverse_written_out(seed, count, blocks, width, folded):
    gradients, weight, kept, _ = drawn(seed, count, blocks, width)
    found = fisher(gradients, kept, 0.01, min(folded, count)).saliency(weight)
    matrices = written_out(gradients, kept, 0.01)
    for block in range(blocks):
        there = kept[block].nonzero().flatten()
        inverse = torch.linalg.inv(matrices[block][there][:, there])
        expected = torch.zeros(width, dtype=torch.float64)
        expected[there] = weight[block, there].double().square() / (2.0 * inverse.diagonal())
        torch.testing.assert_close(found[block], expected, rtol=1e-4, atol=1e-9)


@settings(max_examples=60, deadline=None)
@PROBLEMS
def test_what_is_left_makes_up_as_least_squares_would(seed, count, blocks, width, folded):
    """min |A (w + d)|^2 over d with d_S = -w_S, where F = A^T A, is a dense least-squares problem in d_K."""
    gradients, weight, kept, left = drawn(seed, count, blocks, width)
    found = fisher(gradients, kept, 0.01, min(folded, count)).without(weight, left)
    matrices = written_out(gradients, kept, 0.01)
    for block in range(blocks):
        there, stay = kept[block].nonzero().flatten(), left[block].nonzero().flatten()
        expected = torch.zeros(width, dtype=torch.float64)
        if len(stay):
            root = torch.zeros(width, width, dtype=torch.float64)
            root[there[:, None], there] = torch.linalg.cholesky(matrices[block][there][:, there]).T
            gone = (kept[block] & ~left[block]).double() * weight[block].double()
            change = torch.linalg.lstsq(root[:, stay], (root @ gone)[:, None], driver="gelsd").solution[:, 0]
            expected[stay] = weight[block, stay].double() + change
        torch.testing.assert_close(found[block], expected, rtol=1e-3, atol=1e-4)


def test_few_gradients_and_sums_give_the_same():
    gradients, weight, kept, left = drawn(5, 8, 30, 20)
    one, other = fisher(gradients, kept, 1e-3, 0), fisher(gradients, kept, 1e-3, 8)
    torch.testing.assert_close(one.saliency(weight), other.saliency(weight), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(one.without(weight, left), other.without(weight, left), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.diagonal(), other.diagonal(), rtol=1e-5, atol=1e-9)


def test_the_scale_of_the_loss_does_not_matter():
    gradients, weight, kept, left = drawn(6, 8, 30, 20)
    one, other = fisher(gradients, kept, 0.01, 0), fisher(gradients * 1e-5, kept, 0.01, 0)
    torch.testing.assert_close(one.saliency(weight) * 1e-10, other.saliency(weight), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(one.without(weight, left), other.without(weight, left), rtol=1e-4, atol=1e-5)


def test_many_blocks_are_worked_on_in_parts(monkeypatch):
    gradients, weight, kept, left = drawn(7, 5, 50, 8)
    whole = fisher(gradients, kept, 0.01, 0)
    expected = whole.saliency(weight), whole.without(weight, left)
    monkeypatch.setattr("sparsecomp.training.fisher._ENTRIES", 100)
    torch.testing.assert_close((whole.saliency(weight), whole.without(weight, left)), expected)


def test_where_there_is_no_gradient_weights_stay_and_the_smallest_cost_least():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
    kept = torch.ones(1, 4, dtype=torch.bool)
    left = torch.tensor([[False, True, True, False]])
    for gradients in (torch.zeros(0, 1, 4), torch.zeros(3, 1, 4), torch.zeros(9, 1, 4)):
        none = Fisher(gradients, None, len(gradients), kept, 0.01)
        assert none.saliency(weight).argsort(dim=1).tolist() == [[3, 0, 2, 1]]
        assert none.saliency(weight).max() < 1e-25
        assert none.without(weight, left).tolist() == [[0.0, -3.0, 2.0, 0.0]]


def test_a_damp_too_small_to_invert_is_refused():
    gradients = torch.ones(9, 1, 4) * 3.0
    one = Fisher(gradients, None, 9, torch.ones(1, 4, dtype=torch.bool), 1e-18)
    with pytest.raises(MethodError, match="give a larger damp"):
        one.saliency(torch.ones(1, 4))


@given(st.integers(0, 400), st.integers(1, 20), st.sampled_from([1, 2, 4, 8, 16]))
def test_blocks_are_equal_no_wider_than_asked_and_cut_no_group(columns, blocks, group):
    block = blocks * group
    width = block_width(columns, block, group)
    assert width % group == 0 and 0 < width <= block
    assert -(-columns // width) == max(1, -(-columns // block)) or columns == 0
    matrix = torch.arange(3.0 * columns).view(3, columns)
    parts = to_blocks(matrix, width)
    assert parts.shape == (3 * -(-columns // width), width)
    assert torch.equal(from_blocks(parts, 3, columns), matrix)


# --- the rules ------------------------------------------------------------------------------------------------------


def fed(gradients, weight, rule, pattern, schedule=None):
    """The weight after these gradients with an optimizer that moves nothing, and its mask."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    model = nn.Sequential(layer)
    steps = len(gradients)
    handle = sparsify(model, pattern, optimizer, rule, steps=steps, schedule=schedule or Schedule("cubic", every=steps))
    for each in gradients:
        layer.weight.grad = each.clone()
        optimizer.step()
    mask = handle.masks["0"]
    return handle.bake()[0].weight.detach(), mask


@pytest.mark.parametrize("pattern", ["2:4", "2:4@v4", "block4x4:0.5", "unstructured:0.3"])
def test_the_diagonal_is_the_mean_of_squares_over_the_window(pattern):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 16, generator=generator)
    gradients = [torch.randn(8, 16, generator=generator) for _ in range(7)]
    after, mask = fed(gradients, weight, Obd(gradients=4), pattern)
    mean = sum(each.double().square() for each in gradients[3:]) / 4
    expected = project((weight.double().square() * mean / 2).sqrt(), parse(pattern))
    assert torch.equal(mask, expected)
    assert torch.equal(after, weight * expected)


@pytest.mark.parametrize("pattern", ["2:4", "2:4@v4", "2:4@t", "block4x4:0.5", "unstructured:0.3", "4:2:8"])
@pytest.mark.parametrize("count", [3, 8, 40])
def test_masks_and_weights_are_those_of_the_matrix_written_out(pattern, count):
    """Of the last ``count`` gradients; 40 of them are more than the block has, and are summed as they come."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 40, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(8, 40, generator=generator, dtype=torch.float64).float() for _ in range(count + 2)]
    rule = Obs(gradients=count, block=16)
    after, mask = fed([each.double() for each in gradients], weight, rule, pattern)
    width = 14 if pattern == "unstructured:0.3" else 16  # ceil(40 / 3), up to the next group
    seen = torch.stack([to_blocks(each, width) for each in gradients[2:]])
    real = to_blocks(torch.ones(8, 40, dtype=torch.bool), width)
    matrices = written_out(seen, real, rule.damp)
    matrices += torch.diag_embed((~real).double())
    blocks = to_blocks(weight, width)
    cost = blocks.square() / (2.0 * torch.linalg.inv(matrices).diagonal(dim1=1, dim2=2))
    expected = project(from_blocks(cost, 8, 40).sqrt(), parse(pattern))
    assert torch.equal(mask, expected)
    left = to_blocks(expected, width)
    for block, stays in enumerate(left):
        gone = real[block] & ~stays
        change = torch.linalg.solve(
            matrices[block][stays][:, stays], matrices[block][stays][:, gone] @ blocks[block][gone]
        )
        blocks[block][stays] += change
    torch.testing.assert_close(after, from_blocks(blocks * left, 8, 40), rtol=1e-4, atol=1e-5)


def curved(seed, columns=12, count=48):
    """A quadratic loss of each row with a Hessian of strong correlations, and gradients whose mean of g g^T it is."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    hessian = mixing @ torch.diag(torch.logspace(-2, 1, columns, dtype=torch.float64)) @ mixing.T / columns
    turned = torch.linalg.qr(torch.randn(count, columns, generator=generator, dtype=torch.float64)).Q
    gradients = math.sqrt(count) * turned @ torch.linalg.cholesky(hessian).T
    return hessian, gradients, torch.randn(4, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured:0.4"])
def test_where_the_fisher_is_the_hessian_blocks_beat_the_diagonal_and_magnitude(pattern):
    total = dict.fromkeys(("gradual", "obd", "obs", "obs anew"), 0.0)
    for seed in range(8):
        hessian, gradients, weight = curved(seed)
        torch.testing.assert_close(gradients.T @ gradients / len(gradients), hessian)
        fed_with, count = [each.expand(4, -1) for each in gradients], len(gradients)
        loss = {}
        for name, rule, times in (
            ("gradual", "gradual", 1),
            ("obd", Obd(count), 1),
            ("obs", Obs(count, damp=1e-9), 1),
            ("obs anew", Obs(count, damp=1e-9), 6),
        ):
            after, mask = fed(fed_with * times, weight, rule, pattern, Schedule("linear", every=count))
            assert after[~mask].eq(0).all()
            loss[name] = float(((after - weight) @ hessian * (after - weight)).sum())
            total[name] += loss[name]
        assert loss["obs"] < min(loss["gradual"], loss["obd"])
    assert total["obs"] < 0.6 * min(total["gradual"], total["obd"])
    assert total["obs anew"] < total["obs"]


@cache
def classifier():
    """A small net that tells noisy prototypes apart, trained; and what draws batches."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(8, 32, generator=generator)

    def batch(rows, generator=generator):
        classes = torch.randint(8, (rows,), generator=generator)
        return prototypes[classes] + 1.5 * torch.randn(rows, 32, generator=generator), classes

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        x, classes = batch(64)
        nn.functional.cross_entropy(model(x), classes).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, batch


def one_shot(rule, recomputations, pattern, scope, each=16):
    trained, batch = classifier()
    model = copy.deepcopy(trained)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = Schedule("exponential", every=each)
    steps = recomputations * each
    handle = sparsify(model, pattern, optimizer, rule, steps=steps, schedule=schedule, scope=scope)
    biases = [layer.bias.detach().clone() for layer in model[::2]]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, classes = batch(8, generator)
        nn.functional.cross_entropy(model(x), classes).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(handle.history) == recomputations
    handle.bake()
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(model[::2], biases, strict=True))
    x, classes = batch(4000, generator.manual_seed(2))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), classes))


@pytest.mark.parametrize(("pattern", "scope"), [("unstructured:0.15", "layer"), ("unstructured:0.1", "global")])
def test_in_one_shot_sixteen_recomputations_beat_one_and_magnitude(pattern, scope):
    once = one_shot("obs", 1, pattern, scope)
    often = one_shot("obs", 16, pattern, scope)
    assert often < 0.9 * once
    assert often < 0.9 * one_shot("gradual", 1, pattern, scope)


def test_gradients_are_collected_in_the_window_before_a_change_alone():
    model, optimizer, handle = toys.started(
        "2:4", Obs(gradients=3), 30, schedule=Schedule("linear", warm_up=5, cool_down=5, every=10)
    )
    # 3:4 is asked for after step 15, 2:4 after step 25
    holding = []
    toys.train(
        model, optimizer, 0, 30, after=lambda step: holding.append(bool(handle.state_dict()["layers"]["0"]["state"]))
    )
    assert [step + 1 for step, holds in enumerate(holding) if holds] == [13, 14, 23, 24]
    assert [change.step for change in handle.history if change.flip_rate] == [15, 25]


def test_memory_is_that_of_the_gradients_or_of_blocks():
    for count, entries in ((5, 5), (8, 8), (40, 16 + 8)):
        model, optimizer, handle = toys.started(
            "2:4", Obs(gradients=count, block=8), 42, schedule=Schedule("linear", warm_up=1, every=41)
        )
        toys.train(model, optimizer, 0, 41)
        state = handle.state_dict()["layers"]["0"]["state"]
        assert sum(each.numel() for each in state.values()) == entries * model[0].weight.numel()


@pytest.mark.parametrize("at", [3, 20, 33])
def test_a_run_with_summed_gradients_goes_on_bit_for_bit(at):
    rule = Obs(gradients=40, block=8)
    schedule = Schedule("linear", every=20)
    assert toys.resumes_bit_for_bit("unstructured:0.3", rule, 40, at, schedule=schedule)


def test_groups_that_would_lie_in_two_blocks_are_refused():
    with pytest.raises(PatternError, match='0: block=50 cuts groups of "2:4"; give a multiple of 4'):
        toys.started("2:4", Obs(block=50), 10)
    toys.started("unstructured:0.5", Obs(block=50), 10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Obs(gradients=0), "gradients=0 sees none"),
        (lambda: Obd(gradients=0), "gradients=0 sees none"),
        (lambda: Obs(block=0), "block=0 holds no weight"),
        (lambda: Obs(damp=0.0), "damp=0.0 leaves matrices singular"),
        (lambda: Obs(damp=float("nan")), "damp=nan is not allowed"),
    ],
)
def test_settings_that_make_no_matrix_are_refused(make, words):
    with pytest.raises(MethodError, match=words):
        make()
