"""What all rules that drop weights on a schedule share, and what makes magnitude and |w g|."""

import copy

import pytest
import torch
from torch import nn

import tests.training.toys as toys
from sparsecomp import training
from sparsecomp.errors import MethodError
from sparsecomp.patterns import parse
from sparsecomp.patterns.check import check_mask
from sparsecomp.patterns.project import project
from sparsecomp.training import Schedule, sparsify
from sparsecomp.training.rules import get_rule, rule_names
from sparsecomp.training.rules.gradients import Gradient
from sparsecomp.training.schedule import pattern_at

RULES = ("gradual", "gradient", "obd", "obs")
PATTERNS = (
    ("2:4", "layer"),
    ("8:16", "layer"),
    ("2:4@t", "layer"),
    ("1:4@t", "layer"),
    ("2:4@v4", "layer"),
    ("64:2:8", "layer"),
    ("unstructured:0.1", "layer"),
    ("unstructured:0.1", "global"),
    ("block4x4:0.25", "layer"),
    ("block4x4:0.25", "global"),
)
CUBIC = Schedule("cubic", warm_up=2, cool_down=3, every=2)


def trained(model, optimizer, handle, steps, after):
    for step in range(steps):
        toys.loss_of(model, *toys.batch(step, model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step + 1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("pattern", "scope"), PATTERNS)
def test_masks_fit_the_pattern_of_every_step_and_only_ever_lose_weights(rule, pattern, scope):
    # a width that no group divides
    model, steps = toys.toy(sizes=(22, 37, 10)), 14
    optimizer = toys.adamw(model)
    handle = sparsify(model, pattern, optimizer, rule, steps=steps, schedule=CUBIC, scope=scope)
    goal, layers = parse(pattern), dict(model.named_modules())
    before = handle.masks

    def check(step):
        asked = CUBIC.density(step, steps, goal.density)
        now, masks = pattern_at(goal, asked), handle.masks
        for name, mask in masks.items():
            assert not (mask & ~before[name]).any()
            assert not layers[name].weight[~mask].any()
            assert layers[name].weight[mask].all()  # what is kept learns
            if now is None:
                assert mask.all()
            elif scope == "layer":
                check_mask(mask, now)
                # no fewer than the pattern allows, where the shape does not decide which units are cut short
                if pattern in ("2:4", "8:16", "2:4@v4", "unstructured:0.1"):
                    assert mask.sum() == project(torch.ones(mask.shape), now).sum()
        if scope == "global" and "block" not in pattern:
            assert abs(handle.density - asked) < 2e-3
        before.update(masks)

    trained(model, optimizer, handle, steps, check)
    assert handle.step == steps and handle.density < 0.65
    handle.bake()


@pytest.mark.parametrize("rule", RULES)
def test_a_transposable_mask_stays_full_on_its_way(rule):
    model, optimizer, handle = toys.started("1:4@t", rule, 12, schedule=Schedule("linear", every=1))
    toys.train(model, optimizer, 0, 12)
    assert all(mask.sum() * 4 == mask.numel() for mask in handle.masks.values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("pattern", "scope"), [("2:4", "layer"), ("unstructured:0.1", "global")])
@pytest.mark.parametrize("at", [1, 5, 6, 11])
def test_a_run_goes_on_bit_for_bit_from_the_middle_of_its_schedule(rule, pattern, scope, at):
    assert toys.resumes_bit_for_bit(pattern, rule, 14, at, schedule=CUBIC, scope=scope)


@pytest.mark.parametrize("rule", RULES)
def test_batches_in_parts_and_a_scaler_make_no_difference(rule):
    assert toys.one_way_or_another("2:4", rule, 8)


@pytest.mark.parametrize("rule", RULES)
def test_the_moments_of_dropped_weights_do_not_matter(rule):
    ends = []
    for disturbed in (False, True):
        model, optimizer, handle = toys.started("unstructured:0.2", rule, 14, schedule=CUBIC)
        toys.train(model, optimizer, 0, 8)
        for name, mask in handle.masks.items() if disturbed else ():
            weight = dict(model.named_modules())[name].weight
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weight][moment][~mask] = 3.0
        toys.train(model, optimizer, 8, 14)
        ends.append(toys.weights(handle.bake()))
    assert toys.same(*ends)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40, 1000])
def test_the_schedule_of_its_own_leaves_steps_to_change_masks_in(rule, steps):
    own = get_rule(rule).default(steps)
    own.check(steps)
    assert own.curve == "cubic"
    assert own.cool_down == steps // 4


@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_enough_and_none_of_what_it_learned_is_kept(rule):
    model, optimizer, handle = toys.started("2:4", rule, 1)
    assert handle.density == 1.0
    toys.train(model, optimizer, 0, 1)
    assert handle.density == 0.5
    state = handle.state_dict()
    assert not state["extra"]
    assert not any(each["state"] for each in state["layers"].values())


def test_magnitude_drops_at_once_what_a_constant_schedule_asks_for_at_once():
    model = toys.toy()
    expected = project(model[0].weight.detach().abs(), parse("2:4"))
    handle = sparsify(model, "2:4", toys.adamw(model), "gradual", steps=5, schedule="constant", only="0")
    # its own schedule has no warm-up in 5 steps
    assert torch.equal(handle.masks["0"], expected)


@pytest.mark.parametrize("rule", ["gradient", "obd", "obs"])
def test_what_learns_of_gradients_refuses_to_drop_before_there_are_any(rule):
    with pytest.raises(MethodError, match="give the schedule a warm_up of 1 or more"):
        toys.started("2:4", rule, 5, schedule=Schedule("constant"))
    model, optimizer, handle = toys.started("2:4", rule, 5, schedule=Schedule("constant", warm_up=2))
    toys.train(model, optimizer, 0, 2)
    assert handle.density == 0.5


def test_magnitude_keeps_the_largest_of_what_is_left():
    schedule, steps = Schedule("linear", every=2), 6
    model = nn.Sequential(nn.Linear(24, 10, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = sparsify(model, "unstructured:0.3", optimizer, "gradual", steps=steps, schedule=schedule)
    generator = torch.Generator().manual_seed(4)
    for step in range(1, steps + 1):
        weight, mask = model[0].weight.detach().clone(), handle.masks["0"]
        gradient = torch.randn(10, 24, generator=generator)
        model[0].weight.grad = gradient.clone()
        optimizer.step()
        stepped = weight - 0.1 * gradient * mask
        expected = mask
        if step % 2 == 0:
            expected = project(stepped.abs(), parse(f"unstructured:{schedule.density(step, steps, 0.3)}"))
        assert torch.equal(handle.masks["0"], expected)
        torch.testing.assert_close(model[0].weight.detach(), stepped * expected)


def scored(gradients, momentum, weight, pattern="2:4"):
    """The mask after these gradients at a weight that does not move."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = Gradient(momentum=momentum)
    steps = len(gradients)
    handle = sparsify(model, pattern, optimizer, rule, steps=steps, schedule=Schedule("cubic", every=steps))
    for each in gradients:
        layer.weight.grad = each.clone()
        optimizer.step()
    return handle.masks["0"]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("pattern", ["2:4", "block4x4:0.5", "unstructured:0.3"])
def test_the_score_is_the_sum_of_w_g_that_fades(momentum, pattern):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 16, generator=generator)
    gradients = [torch.randn(8, 16, generator=generator) for _ in range(5)]
    score = sum(momentum ** (4 - n) * (weight * each).abs().double() for n, each in enumerate(gradients))
    assert torch.equal(scored(gradients, momentum, weight, pattern), project(score.sqrt(), parse(pattern)))


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_what_is_no_momentum_is_refused(momentum):
    with pytest.raises(MethodError, match=r"momentum=.* is not allowed; give a number"):
        Gradient(momentum=momentum)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_that_takes_no_part_is_dropped_by_the_schedule_too(rule):
    model = toys.toy()
    model.add_module("aside", nn.Linear(8, 8))
    optimizer = toys.adamw(model)
    handle = sparsify(model, "2:4", optimizer, rule, steps=4, schedule=Schedule("cubic"))
    used = nn.Sequential(*list(model)[:4])
    toys.train(used, optimizer, 0, 4)
    assert handle.masks["aside"].sum() == 32
    assert torch.isfinite(model.aside.weight).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_weight_that_is_stored_transposed_gets_the_same_masks(rule):
    transformers = pytest.importorskip("transformers.pytorch_utils")
    plain = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh()).double()
    turned = copy.deepcopy(plain)
    for place in (0, 2):
        other = transformers.Conv1D(plain[place].out_features, plain[place].in_features).double()
        other.weight.data.copy_(plain[place].weight.T)
        other.bias.data.copy_(plain[place].bias)
        other.in_features, other.out_features = plain[place].in_features, plain[place].out_features
        turned[place] = other
    ends = []
    for model in (plain, turned):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = sparsify(model, "2:4", optimizer, rule, steps=9, schedule=Schedule("linear", every=2))
        toys.train(model, optimizer, 0, 9)
        ends.append((handle.masks, model[0].weight.detach(), model[2].weight.detach()))
    for name in ("0", "2"):
        assert torch.equal(ends[0][0][name], ends[1][0][name])
    torch.testing.assert_close(ends[0][1], ends[1][1].T)
    torch.testing.assert_close(ends[0][2], ends[1][2].T)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_weights_are_dropped_as_well(rule):
    model, optimizer, handle = toys.started("2:4", rule, 6, dtype=torch.bfloat16, schedule=Schedule("linear"))
    toys.train(model, optimizer, 0, 6)
    assert handle.density == 0.5
    assert all(torch.isfinite(each).all() for each in handle.bake().parameters())


def test_every_rule_can_be_had_by_its_class():
    for name in rule_names():
        assert getattr(training, type(get_rule(name)).__name__)().name == name
