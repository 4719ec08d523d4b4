import math

import pytest
import torch

from sparsecomp.errors import MethodError, PatternError
from sparsecomp.training import Schedule, sparsify
from sparsecomp.training.rules.soft_movement import SoftMovement
from tests.training.toys import (
    adamw,
    batch,
    loss_of,
    one_way_or_another,
    resumes_bit_for_bit,
    started,
    toy,
    train,
)


def classes(steps, rule, density, lr=1e-3, seed=0):
    """A small classifier of sums of a few inputs, trained by Adam; gives densities before and after the last choice."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.ReLU(), torch.nn.Linear(64, 6))
    truth = torch.randn(40, 6) * (torch.rand(40, 1) < 0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    handle = sparsify(model, f"unstructured:{density}", optimizer, rule, steps=steps, scope="global")
    densities = []
    for _ in range(steps):
        x = torch.randn(64, 40)
        torch.nn.functional.cross_entropy(model(x), (x @ truth).argmax(dim=1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        densities.append(handle.density)
    last = handle._progress.schedule.last(steps)
    return densities[last - 2], densities[last - 1], densities, handle


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"linear": -2.0},
        {"linear": 3.0},
        {"quadratic": 2.0},
        {"quadratic": 8.0},
        {"lr": 5e-3},
        {"lr": 3e-2},
        {"temperature": 0.7},
    ],
)
@pytest.mark.parametrize("density", [0.03, 0.1, 0.4])
def test_the_asked_density_is_met_from_any_start_of_the_multipliers(settings, density):
    before, after, densities, handle = classes(400, SoftMovement(**settings), density)
    total = 40 * 64 + 64 * 6
    assert abs(before - density) < 0.01
    assert after == densities[-1] == handle.density == math.ceil(density * total - 1e-9) / total


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_the_asked_density_is_met_at_other_learning_rates_of_the_weights(lr):
    before, after, _, _ = classes(400, "soft-movement", 0.1, lr=lr)
    assert abs(before - 0.1) < 0.01
    assert after == pytest.approx(0.1, abs=1e-3)


def test_density_is_whole_in_the_warm_up_follows_the_schedule_and_rests_in_the_cool_down():
    _, _, densities, handle = classes(400, "soft-movement", 0.1)
    schedule = handle._progress.schedule
    assert set(densities[: schedule.warm_up]) == {1.0}
    asked = [schedule.density(step, 400, 0.1) for step in range(1, 401)]
    behind = [abs(one - other) for one, other in zip(densities, asked, strict=True)]
    assert max(behind[150:]) < 0.05
    assert len(set(densities[schedule.last(400) - 1 :])) == 1


@pytest.mark.parametrize("pattern", ["unstructured:0.1", "block4x4:0.25", "block3x7:0.25"])
def test_dropped_weights_are_zero_after_every_step_and_masks_are_what_lies_above_the_threshold(pattern):
    model, optimizer, handle = started(pattern, "soft-movement", 100, scope="global")
    schedule = handle._progress.schedule

    def check(step):
        for name, mask in handle.masks.items():
            weight = dict(model.named_modules())[name].weight
            assert torch.equal(weight != 0, mask)
            if schedule.warm_up < step < 75 and schedule.acts(step, 100):
                score = handle._layers[name].state["score"]
                above = score >= handle._progress.extra["threshold"]
                if pattern.startswith("block"):
                    rows, columns = (int(each) for each in pattern[5:8].split("x"))
                    above = above.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[
                        : mask.shape[0], : mask.shape[1]
                    ]
                    unit = rows * columns
                else:
                    unit = math.ceil(0.005 * mask.numel())
                # a layer that lies below the threshold keeps its least share, here one block
                assert torch.equal(mask, above) if above.any() else 0 < int(mask.sum()) <= unit

    train(model, optimizer, 0, 100, after=check)
    assert handle.density < 0.3
    handle.bake()


def test_the_gradient_of_scores_is_that_of_the_loss_and_of_the_penalty_by_finite_differences():
    rule = SoftMovement(betas=(0.0, 0.9), temperature=0.7)  # the first moment is then the gradient of the last step
    model, optimizer, handle = started("unstructured:0.2", rule, 60, torch.float64, scope="global")
    train(model, optimizer, 0, 20)
    extra, layers = handle._progress.extra, list(handle._layers.values())
    linear, quadratic, size, theta = (extra[key] for key in ("linear", "quadratic", "size", "threshold"))
    width = 0.7 * float(torch.cat([each.state["score"].flatten() for each in layers]).double().std(correction=0))
    total = sum(each.mask.numel() for each in layers)
    asked = handle._progress.schedule.density(20, 60, 0.2)
    share = sum(float((each.state["score"] >= theta).sum()) for each in layers) / total
    off = max(-1.0, min(1.0, (share - asked) / asked))
    score = layers[0].state["score"].double().clone()
    dense = layers[0].dense.clone()

    def penalty(changed):
        smooth = torch.sigmoid((changed - theta) / width).sum() / total / asked
        # the slope of a d + b d^2 where d is, times the change of d
        return (linear + 2 * quadratic * off) * smooth

    loss_of(model, *batch(20, model)).backward()
    moved = model[0].weight.grad * dense
    optimizer.step()
    expected = torch.zeros_like(score)
    for index in range(0, score.numel(), 37):
        up, down = score.clone(), score.clone()
        up.view(-1)[index] += 1e-5
        down.view(-1)[index] -= 1e-5
        # in units of the mean gradient, at most 1 for a unit at the threshold
        slope = (penalty(up) - penalty(down)) / 2e-5 * (total * asked * 4 * width) * size
        expected.view(-1)[index] = moved.view(-1)[index] + slope
    found = layers[0].state["score_exp_avg"].double().view(-1)[::37]
    assert abs(extra["force"]) > 0.0 and off != 0.0
    torch.testing.assert_close(found, expected.view(-1)[::37], rtol=1e-3, atol=1e-3 * size)


def _recovered(method, density=0.06, steps=300):
    """The share of a sparse truth's weights that a method keeps; wrong weights begin larger than true ones."""
    torch.manual_seed(3)
    truth = torch.where(torch.rand(16, 32) < density, torch.randn(16, 32).sign(), 0.0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False), torch.nn.Identity())
    with torch.no_grad():
        model[0].weight.copy_(torch.where(truth != 0, 0.2 * truth, 0.4 * torch.randn(16, 32).sign()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    settings = {"start": "magnitude"} if method == "fixed" else {}
    kept = float((truth != 0).float().mean())
    handle = sparsify(model, f"unstructured:{kept}", optimizer, method, steps=steps, scope="global", **settings)
    for _ in range(steps):
        x = torch.randn(64, 32)
        (model(x) - x @ truth.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(handle.masks["0"][truth != 0].float().mean())


def test_it_finds_a_sparse_truth_that_magnitude_misses():
    assert _recovered("soft-movement") > 0.9
    assert _recovered("fixed") < 0.1


def test_every_layer_keeps_its_least_share():
    model = toy(sizes=(40, 60, 50))
    optimizer = adamw(model)
    handle = sparsify(model, "unstructured:0.05", optimizer, "soft-movement", steps=60, scope="global")
    least = math.ceil(0.005 * 60 * 50)

    def sink(step):
        handle._layers["2"].state["score"].sub_(1.0)
        assert int(handle.masks["2"].sum()) >= least

    train(model, optimizer, 0, 60, after=sink)
    assert int(handle.masks["2"].sum()) == least
    assert handle.density == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured:0.1", "block4x4:0.3"])
@pytest.mark.parametrize("at", [2, 17, 33])
def test_a_run_resumes_bit_for_bit(pattern, at):
    assert resumes_bit_for_bit(pattern, "soft-movement", 40, at, scope="global")


def test_accumulation_and_a_scaler_change_nothing():
    assert one_way_or_another("unstructured:0.2", "soft-movement", 40, scope="global")


def test_a_schedule_without_warm_up_and_cool_down_ends_at_its_goal():
    schedule = Schedule("constant")
    model, optimizer, handle = started("unstructured:0.1", "soft-movement", 30, scope="global", schedule=schedule)
    train(model, optimizer, 0, 30)
    assert handle.density == pytest.approx(0.1, abs=1e-3)


def test_what_has_no_density_to_share_out_is_refused():
    model = toy()
    with pytest.raises(PatternError, match='"2:4" as many in every group; use the method "movement"'):
        sparsify(model, "2:4", adamw(model), "soft-movement", steps=10)
    with pytest.raises(PatternError, match='pass scope="global"'):
        sparsify(model, "unstructured:0.1", adamw(model), "soft-movement", steps=10)
    with pytest.raises(MethodError, match="holds no density"):
        SoftMovement(temperature=0.0)
