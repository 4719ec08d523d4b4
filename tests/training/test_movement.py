import math

import pytest
import torch

from sparsecomp.errors import MethodError
from sparsecomp.training import Schedule, sparsify
from sparsecomp.training.choice import from_units, largest_units
from sparsecomp.training.rules.movement import Movement
from tests.training.toys import (
    adamw,
    batch,
    fits_after_every_step,
    loss_of,
    one_way_or_another,
    resumes_bit_for_bit,
    started,
    toy,
    train,
)

SOME = ("2:4", "8:16", "2:4@t", "2:4@v4", "64:2:8", "block4x4:0.25", "block3x7:0.25", "unstructured:0.1")


def scores(handle, name="0"):
    return handle._layers[name].state["score"]


@pytest.mark.parametrize("pattern", ["unstructured:0.3", "block4x4:0.3", "block5x7:0.3"])
def test_the_gradient_of_scores_is_the_finite_difference_of_the_loss_by_a_gate_on_each_weight(pattern):
    model = toy(sizes=(12, 10, 6), dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rule = Movement(betas=(0.0, 0.9))  # the first moment is then the gradient of the last step
    handle = sparsify(model, pattern, optimizer, rule, steps=20, schedule=Schedule("cubic", cool_down=2))
    train(model, optimizer, 0, 12)
    layer = handle._layers["0"]
    assert 0 < handle.masks["0"].sum() < 120
    dense, mask = layer.dense.clone(), layer.mask.double()
    x, y = batch(12, model)
    expected = torch.zeros_like(dense)
    for index in range(dense.numel()):
        ends = []
        for change in (1e-6, -1e-6):
            gate = mask.clone()
            gate.view(-1)[index] += change
            with torch.no_grad():
                model[0].weight.copy_(dense * gate)
                ends.append(loss_of(model, x, y))
        expected.view(-1)[index] = (ends[0] - ends[1]) / 2e-6
    with torch.no_grad():
        layer.show()
    train(model, optimizer, 12, 13)
    if pattern.startswith("block"):
        rows, columns = (int(each) for each in pattern[5:8].split("x"))
        expected = torch.stack([each.sum(0) for each in expected.split(rows)])
        expected = torch.stack([each.sum(1) for each in expected.split(columns, dim=1)], dim=1)
    assert layer.state["score_exp_avg"].shape == expected.shape
    torch.testing.assert_close(layer.state["score_exp_avg"].double(), expected, rtol=1e-4, atol=1e-9)


def test_the_dense_weight_gets_the_masked_gradient():
    model = toy(sizes=(12, 10, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = sparsify(model, "2:4", optimizer, "movement", steps=20, schedule=Schedule("constant"))
    train(model, optimizer, 0, 3)
    layer = handle._layers["0"]
    before, mask = layer.dense.clone(), layer.mask.clone()
    loss_of(model, *batch(3, model)).backward()
    gradient = model[0].weight.grad.clone()
    assert gradient[~mask].any()
    optimizer.step()
    torch.testing.assert_close(layer.dense, before - 0.5 * gradient * mask)


def test_dropped_weights_keep_their_value_under_momentum_and_decay_and_come_back_with_it():
    model, optimizer, handle = started("2:4", Movement(lr=0.1), 40, schedule=Schedule("constant"))
    layer, returned = handle._layers["0"], 0
    for step in range(40):
        before, mask = layer.dense.clone(), layer.mask.clone()
        train(model, optimizer, step, step + 1)
        assert torch.equal(layer.dense[~mask], before[~mask])
        assert not torch.equal(layer.dense[mask], before[mask])
        back = ~mask & layer.mask
        returned += int(back.sum())
        assert torch.equal(model[0].weight[back], before[back])
    assert returned > 0


@pytest.mark.parametrize("pattern", SOME)
def test_weights_fit_what_the_schedule_asks_for_after_every_step(pattern):
    seen = fits_after_every_step(pattern, "movement", 60)
    assert {"None", pattern} <= seen
    assert len(seen) > 2 or pattern == "64:2:8"


@pytest.mark.parametrize(
    ("pattern", "units"), [("unstructured:0.1", 24 * 40 + 40 * 20), ("block3x7:0.25", 14 * 4 + 42)]
)
def test_the_global_choice_keeps_exactly_its_share_after_every_step(pattern, units):
    model, optimizer, handle = started(pattern, "movement", 60, scope="global")
    schedule, goal = handle._progress.schedule, float(pattern.split(":")[1])
    kept = units

    def check(step):
        nonlocal kept
        if schedule.acts(step, 60):
            kept = math.ceil(schedule.density(step, 60, goal) * units - 1e-9)
        masks = handle.masks
        if pattern.startswith("block"):
            masks = {name: torch.stack([e.any(0) for e in mask.split(3)]) for name, mask in masks.items()}
            masks = {name: torch.stack([e.any(1) for e in mask.split(7, dim=1)]) for name, mask in masks.items()}
        assert sum(int(mask.sum()) for mask in masks.values()) == kept

    train(model, optimizer, 0, 60, after=check)
    least = min(float(scores(handle, name)[_kept(handle, name)].min()) for name in ("0", "2"))
    largest = max(float(scores(handle, name)[~_kept(handle, name)].max()) for name in ("0", "2"))
    assert least >= largest
    assert kept == math.ceil(goal * units)


def _kept(handle, name):
    mask = handle._layers[name].mask
    if scores(handle, name).shape == mask.shape:
        return mask
    mask = torch.stack([each.any(0) for each in mask.split(3)])
    return torch.stack([each.any(1) for each in mask.split(7, dim=1)], dim=1)


def test_scores_learn_as_adam_written_out_and_rest_in_the_cool_down():
    rule = Movement(lr=0.02, betas=(0.8, 0.95), damping=0.5)
    model, optimizer, handle = started("unstructured:0.2", rule, 30, schedule=Schedule("linear", 3, 10))
    layer = handle._layers["0"]
    score = first = second = torch.zeros(40, 24, dtype=torch.float64)
    for step in range(30):
        loss_of(model, *batch(step, model)).backward()
        moved = model[0].weight.grad.double() * layer.dense.double()
        if step < 20:
            first = 0.8 * first + 0.2 * moved
            second = 0.95 * second + 0.05 * moved**2
            steps = step + 1
            eps = 0.5 * moved.square().mean().sqrt()
            score = score - 0.02 * (first / (1 - 0.8**steps)) / ((second / (1 - 0.95**steps)).sqrt() + eps)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(scores(handle).double(), score, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_of_scores_follows_that_of_the_weights():
    def after_one(make):
        model = toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        make(optimizer)
        handle = sparsify(model, "2:4", optimizer, Movement(damping=0.0), steps=10)
        train(model, optimizer, 0, 1)
        return float(scores(handle).abs().max())

    schedulers = torch.optim.lr_scheduler
    assert after_one(lambda optimizer: None) == pytest.approx(0.01)
    assert after_one(lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 0.25)) == pytest.approx(0.0025)
    assert after_one(lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 0.0)) == 0.0
    cycle = after_one(lambda optimizer: schedulers.OneCycleLR(optimizer, 5.0, total_steps=10, div_factor=20.0))
    assert cycle == pytest.approx(0.01 / 20)


def test_without_a_scheduler_the_peak_is_the_largest_rate_there_was():
    model, optimizer, handle = started("2:4", Movement(damping=0.0), 20)
    group = optimizer.param_groups[0]
    moves = []
    for step, rate in enumerate((0.001, 0.004, 0.002, 0.0)):
        group["lr"] = rate
        before = scores(handle).clone()
        train(model, optimizer, step, step + 1)
        moves.append(float((scores(handle) - before).abs().max()))
    assert moves[0] == pytest.approx(0.01)
    assert moves[1] > moves[2] > moves[3] == 0.0


@pytest.mark.parametrize(
    ("pattern", "scope"), [("2:4", "layer"), ("unstructured:0.1", "global"), ("block4x4:0.3", "layer")]
)
@pytest.mark.parametrize("at", [2, 17])
def test_a_run_resumes_bit_for_bit(pattern, scope, at):
    assert resumes_bit_for_bit(pattern, "movement", 40, at, scope=scope)


def test_accumulation_and_a_scaler_change_nothing():
    assert one_way_or_another("2:4", "movement", 40)


def test_weights_that_move_away_from_zero_stay_though_they_are_small():
    # the truth uses 6 of 24 inputs; those begin with small weights, the others with large ones
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(24, 8, bias=False), torch.nn.Identity())
    used = torch.arange(0, 24, 4)
    truth = torch.zeros(8, 24)
    truth[:, used] = torch.randn(8, 6).sign()
    with torch.no_grad():
        model[0].weight.copy_(0.5 * torch.randn(8, 24).sign())
        model[0].weight[:, used] = 0.1 * truth[:, used]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    handle = sparsify(model, "1:4", optimizer, "movement", steps=100)
    for _ in range(100):
        x = torch.randn(64, 24)
        (model(x) - x @ truth.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(handle.masks["0"], truth != 0)


def test_settings_that_learn_nothing_are_refused():
    with pytest.raises(MethodError, match="learns nothing"):
        Movement(lr=0.0)
    with pytest.raises(MethodError, match="no shares"):
        Movement(betas=(1.0, 0.9))
    with pytest.raises(MethodError, match="below 0"):
        Movement(damping=-1.0)


def test_scores_of_a_half_precision_model_are_single():
    model = toy(dtype=torch.bfloat16)
    handle = sparsify(model, "2:4", adamw(model), "movement", steps=4)
    train(model, handle._progress.optimizer, 0, 4)
    assert scores(handle).dtype == torch.float32 and scores(handle).any()


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("pattern", ["unstructured:0.1", "block4x4:0.1", "block3x7:0.1"])
def test_a_choice_over_all_layers_is_that_of_a_sort_with_a_least_share_for_each(pattern, density):
    model = toy(sizes=(60, 50, 40))
    handle = sparsify(model, pattern, adamw(model), "movement", steps=4, scope="global")
    layers = list(handle._layers.values())
    for apart in (0.0, 100.0):  # the second layer far below the first
        saliency = {each.name: torch.randn_like(scores(handle, each.name)) for each in layers}
        saliency["2"] -= apart
        masks = largest_units(layers, saliency, density)
        sizes = {name: each.numel() for name, each in saliency.items()}
        least = {name: math.ceil(min(0.005, density) * size - 1e-9) for name, size in sizes.items()}
        count = max(math.ceil(density * sum(sizes.values()) - 1e-9), sum(least.values()))
        order = sorted(((float(v), n, i) for n, s in saliency.items() for i, v in enumerate(s.flatten())), reverse=True)
        first = [each for n in sizes for each in [e for e in order if e[1] == n][: least[n]]]
        chosen = set(first)
        kept = set((first + [each for each in order if each not in chosen])[:count])
        for layer in layers:
            expected = torch.zeros(sizes[layer.name], dtype=torch.bool)
            expected[[i for _, n, i in kept if n == layer.name]] = True
            expected = from_units(layer, expected.view(saliency[layer.name].shape))
            assert torch.equal(masks[layer.name], expected)
