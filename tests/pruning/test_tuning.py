"""Tuning under fixed masks: it learns, it obeys, it never keeps what is worse."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from sparsecomp.errors import CalibrationError, MethodError
from sparsecomp.models.batches import split
from sparsecomp.patterns import parse
from sparsecomp.patterns.project import project
from sparsecomp.pruning.learning import Call
from sparsecomp.pruning.tuning import Target, Tuning, TuningReport, tune, variance


def masked_linear(
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Sequential, dict[str, Tensor], list[Tensor], list[Tensor]]:
    """A linear layer and norm, its mask, batches and what the dense layer makes of them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12)).to(dtype)
    mixing = torch.randn(4, 16)  # features that depend on each other: what is dropped can be made up for
    batches = [(torch.randn(40, 4) @ mixing + 0.1 * torch.randn(40, 16)).to(dtype) for _ in range(6)]
    with torch.no_grad():
        wanted = [module(x) for x in batches]
        mask = project(module[0].weight.abs(), parse("2:4"))
        module[0].weight.mul_(mask)
    return module, {"0.weight": mask}, batches, wanted


def loss_of(batches: list[Tensor], wanted: list[Tensor]):
    targets = [Target(each, None) for each in wanted]
    scale = variance(targets)

    def loss(call: Call, index: int) -> Tensor:
        return targets[index].loss(call(batches[index])) / scale

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_learns_and_dropped_weights_stay_zero(dtype):
    module, masks, batches, wanted = masked_linear(dtype)
    module[0].bias.requires_grad_(False)
    loss = loss_of(batches, wanted)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    report = tune("block", module, masks, loss, [0, 1, 2, 3, 4], [5], Tuning(steps=80, learning_rate=1e-2))
    assert report.best_step > 0
    assert report.held_out_after < 0.9 * report.held_out_before
    with torch.no_grad():
        assert float(loss(module, 5)) == pytest.approx(
            report.held_out_after, rel=0.05 if dtype != torch.float32 else 1e-4
        )
    assert not bool((module[0].weight[~masks["0.weight"]] != 0).any())
    assert all(not torch.equal(new, old) for new, old in zip(module.parameters(), before, strict=True))
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, False, True, True]
    assert all(parameter.grad is None and parameter.dtype == dtype for parameter in module.parameters())


def test_if_every_step_is_worse_nothing_changes():
    module, masks, batches, wanted = masked_linear()
    right = nn.Linear(16, 12)
    with torch.no_grad():
        module[0].weight.copy_(right.weight * masks["0.weight"])
        wanted[5] = module(batches[5])  # the held-out batch is met exactly, so that every change is for the worse
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = tune("block", module, masks, loss_of(batches, wanted), [0, 1], [5], Tuning(steps=9))
    assert report.best_step == 0 and report.held_out_after == report.held_out_before
    assert report.train_after == report.train_before
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert "no step was better" in str(report)


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    results = []
    for seed in (0, 0, 1):
        module, masks, batches, wanted = masked_linear()
        tune("block", module, masks, loss_of(batches, wanted), [0, 1, 2, 3], [4, 5], Tuning(steps=5, seed=seed))
        results.append(module[0].weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_loss_that_is_not_finite_ends_with_the_best_state():
    module, masks, batches, wanted = masked_linear()
    good = loss_of(batches, wanted)
    calls = {"count": 0}

    def loss(call: Call, index: int) -> Tensor:
        calls["count"] += index == 0
        return good(call, index) * (math.nan if calls["count"] > 30 and index == 0 else 1.0)

    report = tune("block", module, masks, loss, [0], [1], Tuning(steps=200, learning_rate=1e-2))
    assert report.stopped is not None and "not finite at step 30" in report.stopped
    assert math.isfinite(report.held_out_after) and report.held_out_after < report.held_out_before
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["train_after"] is None
    assert TuningReport.from_dict(told).best_step == report.best_step


def test_interrupted_it_leaves_the_module_as_it_was():
    module, masks, batches, wanted = masked_linear()
    good = loss_of(batches, wanted)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    seen = []

    def loss(call: Call, index: int) -> Tensor:
        seen.append(index)
        if len(seen) > 20:
            raise KeyboardInterrupt
        return good(call, index)

    module.train()
    with pytest.raises(KeyboardInterrupt):
        tune("block", module, masks, loss, [0, 1], [2], Tuning(steps=50))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert module.training and module[0].training


@pytest.mark.parametrize(("count", "share"), [(2, 0.1), (2, 0.9), (10, 0.1), (22, 0.1), (7, 0.5), (40, 0.99)])
def test_batches_are_split_once_and_spread(count, share):
    batches, train, held_out = split(range(count), None, share)
    assert sorted(train + held_out) == list(range(count)) == batches
    assert train and held_out
    assert len(held_out) == min(max(1, round(count * share)), count - 1)


def test_given_batches_are_held_out():
    assert split(iter("abc"), iter("xy"), 0.1) == (["a", "b", "c", "x", "y"], [0, 1, 2], [3, 4])
    with pytest.raises(CalibrationError, match="got 0 batches and 1 held out"):
        split([], ["x"], 0.1)
    with pytest.raises(CalibrationError, match="tuning got 1 batch; it needs at least 2"):
        split(["a"], None, 0.1)


def test_a_target_counts_only_the_rows_of_its_mask_in_float64_terms():
    output, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    want = (output[mask].double() - other[mask].double()).square().sum() / 3
    assert float(Target(output, mask).loss(other)) == pytest.approx(float(want), rel=1e-6)
    whole = (output.double() - other.double()).square().sum() / 6
    assert float(Target(output, torch.ones(7, dtype=torch.bool)).loss(other)) == pytest.approx(float(whole), rel=1e-6)
    rows = output[mask].double()
    assert variance([Target(output, mask)]) == pytest.approx(float((rows - rows.mean(0)).square().sum() / 3), rel=1e-6)
    assert variance([Target(torch.ones(1, 4), None)]) == 1.0


def test_settings_that_cannot_run_are_refused():
    with pytest.raises(MethodError, match="steps=0 tunes nothing"):
        Tuning(steps=0)
    with pytest.raises(MethodError, match="learning_rate=-1"):
        Tuning(learning_rate=-1)
    with pytest.raises(MethodError, match="held_out=1"):
        Tuning(held_out=1.0)
    with pytest.raises(MethodError, match="block: it has no weight, bias or norm"):
        tune("block", nn.ReLU(), {}, lambda call, index: torch.zeros(()), [0], [1], Tuning())
