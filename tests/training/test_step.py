"""STEP against its definition, written out: dense Adam, then Adam under a frozen variance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.errors import MethodError
from tests.training import small

RATE, BETAS, EPSILON, DECAY = 0.01, (0.8, 0.9), 1e-8, 0.1


def toy() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 4, bias=False, dtype=torch.float64)


def data(index: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + index)
    return torch.randn(6, 8, generator=draw).double(), torch.randn(6, 4, generator=draw).double()


def definition(steps: int, switch: int, decoupled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Dense weight, mask and frozen variance after ``steps`` steps, masks beginning after ``switch`` of them."""
    weight = toy().weight.detach().clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    beta1, beta2 = BETAS
    for t in range(1, steps + 1):
        leaf = (weight * mask).requires_grad_()
        x, y = data(t)
        (x @ leaf.T - y).square().mean().backward()
        assert leaf.grad is not None
        g = leaf.grad if decoupled else leaf.grad + DECAY * weight
        if decoupled:
            weight = weight * (1 - RATE * DECAY)
        m = beta1 * m + (1 - beta1) * g
        if t <= switch:
            v = beta2 * v + (1 - beta2) * g**2
            scale = (v / (1 - beta2**t)).sqrt() + EPSILON
        else:
            scale = (v / (1 - beta2**switch)).sqrt() + EPSILON**0.75
        weight = weight - RATE * m / (1 - beta1**t) / scale
        if t >= switch:
            mask = sc.prune_weight(weight, "2:4").mask
    return weight, mask, v


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("count", [4, 5, 6, 10])
def test_steps_frozen_variance(kind: Any, how: dict[str, bool], count: int) -> None:
    layer = toy()
    optimizer = kind(layer.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY, **how)
    handle = sc.sparsify(layer, "2:4", optimizer, sc.training.Step(settled=0.0), steps=10)
    for t in range(1, count + 1):
        x, y = data(t)
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    weight, mask, variance = definition(count, 5, kind is torch.optim.AdamW)
    assert torch.equal(handle.masks[""], mask) and bool(mask.all()) == (count < 5)
    learned = handle.state_dict()["layers"][""]["dense"]
    torch.testing.assert_close(learned, weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.weight.detach(), weight * mask, rtol=1e-10, atol=1e-12)
    state = optimizer.state[layer.weight]
    torch.testing.assert_close(state["exp_avg_sq"], variance, rtol=1e-10, atol=1e-14)
    assert float(state["step"]) == count


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_watched_change_is_that_of_the_variance(kind: Any) -> None:
    model = small.model()
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    handle = sc.sparsify(model, "2:4", optimizer, "step", steps=200)
    weights = (model[0].weight, model[2].weight)
    before = [torch.zeros_like(each) for each in weights]
    want = []
    for batch in small.batches(25):
        optimizer.zero_grad()
        small.loss_of(model, batch).backward()
        optimizer.step()
        now = [optimizer.state[each]["exp_avg_sq"].clone() for each in weights]
        moved = torch.cat([(a - b).abs().flatten() for a, b in zip(now, before, strict=True)])
        want.append(moved.double().mean())
        before = now
    changes = handle.state_dict()["extra"]["changes"]
    # the window: a tenth of the steps, below the 1000 of beta2
    assert len(changes) == 20
    torch.testing.assert_close(changes, torch.stack(want[-20:]), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("settled", "beta2", "steps", "switched"),
    [
        (torch.inf, 0.999, 40, 5),  # after the first tenth
        (torch.inf, 0.5, 40, 5),
        (0.0, 0.999, 40, 20),  # at the latest at half
        (0.0, 0.999, 1, 1),
        (torch.inf, 0.999, 3, 1),
    ],
)
def test_when_it_switches(settled: float, beta2: float, steps: int, switched: int) -> None:
    model = small.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, beta2))
    handle = sc.sparsify(model, "2:4", optimizer, sc.training.Step(settled=settled), steps=steps)
    assert "dense by design" in str(handle)
    for index, batch in enumerate(small.batches(steps), 1):
        optimizer.zero_grad()
        small.loss_of(model, batch).backward()
        optimizer.step()
        assert handle.density == (1.0 if index < switched else 0.5)
        if index >= switched:
            small.obeys(handle)
    assert f"frozen since step {switched}" in str(handle)
    small.obeys(handle)
    handle.bake()


def test_the_first_phase_is_plain_training() -> None:
    results = []
    for sparse in (False, True):
        model = small.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if sparse:
            sc.sparsify(model, "2:4", optimizer, "step", steps=20)
        for batch in small.batches(9):
            optimizer.zero_grad()
            small.loss_of(model, batch).backward()
            optimizer.step()
        results.append(model)
    assert small.equal(*results)


def test_a_layer_that_thaws_late_freezes_its_variance_then() -> None:
    model = small.model()
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = sc.sparsify(model, "2:4", optimizer, "step", steps=8)
    variances = []
    for index, batch in enumerate(small.batches(8)):
        model[2].requires_grad_(index >= 5)
        optimizer.zero_grad()
        small.loss_of(model, batch).backward()
        optimizer.step()
        if index >= 5:
            variances.append(optimizer.state[model[2].weight]["exp_avg_sq"].clone())
        if index >= 4:
            small.obeys(handle)
    assert all(torch.equal(each, variances[0]) for each in variances)
    assert float(optimizer.state[model[2].weight]["step"]) == 3


def test_baked_in_the_first_phase_says_so() -> None:
    model = small.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = sc.sparsify(model, "2:4", optimizer, "step", steps=8)
    with pytest.warns(UserWarning, match=r"baked after step 0 of 8.*dense by design .at the latest until step 4"):
        handle.bake()
    assert float((model[0].weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_forms_of_adam_that_it_does_not_make_are_refused(option: str) -> None:
    model = small.model()
    optimizer = torch.optim.AdamW(model.parameters(), **{option: True})
    with pytest.raises(MethodError, match=f"makes the updates of Adam itself, without {option}"):
        sc.sparsify(model, "2:4", optimizer, "step", steps=4)


def test_other_optimizers_are_refused() -> None:
    model = small.model()
    with pytest.raises(MethodError, match='the optimizer is SGD, so use method="sr-ste"'):
        sc.sparsify(model, "2:4", torch.optim.SGD(model.parameters(), lr=0.1), "step", steps=4)
    handle = sc.sparsify(model, "2:4", method="step", steps=4)
    with pytest.raises(MethodError, match="the optimizer is NAdam"):
        handle.attach(torch.optim.NAdam(model.parameters()))


def test_phases_that_are_none_are_refused() -> None:
    for wrong in ({"earliest": 0.6}, {"latest": 1.5}, {"earliest": -0.1}):
        with pytest.raises(MethodError, match="give 0 <= earliest <= latest <= 1"):
            sc.training.Step(**wrong)
