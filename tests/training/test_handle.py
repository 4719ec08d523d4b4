"""The handle: what it leaves alone, what it saves, and what it says of bad input."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import sparsecomp as sc
from tests.training import small
from tests.training.small import made, tensors, train

METHODS = ("fixed", "sr-ste", "step")


# --- what it leaves alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_keys_copies_and_pickles(method: str) -> None:
    keys = list(small.model().state_dict())
    model, optimizer, _ = made(method)
    train(model, optimizer, 6)
    assert list(model.state_dict()) == keys
    x = torch.randn(3, small.IN)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and type(other) is type(model)
        assert sc.masks(other) == {}
        # a copy is nobody's: its optimizer fills the zeros, and the original is not touched
        before = {key: value.clone() for key, value in model.state_dict().items()}
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), 1)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pickle.dumps(optimizer)
    copy.deepcopy(optimizer)


def test_hooks_of_the_users_modules_and_parameters_still_run() -> None:
    model = small.model()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].weight.register_hook(lambda _: calls.append("gradient"))
    model[0].weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sc.sparsify(model, "2:4", optimizer, "sr-ste", steps=1)
    train(model, optimizer, 1)
    assert calls == ["forward", "gradient", "accumulated"]


def test_training_that_nobody_holds_goes_on() -> None:
    model = small.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sc.sparsify(model, "2:4", optimizer, steps=2)
    train(model, optimizer, 2)
    assert all(float((layer.weight == 0).float().mean()) == 0.5 for layer in (model[0], model[2]))
    assert list(sc.masks(model)) == ["0", "2"]


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_the_owner_writes_in_place_count(method: str) -> None:
    model, optimizer, handle = made(method)
    train(model, optimizer, 5)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizer, 1, seed=5)
    model.load_state_dict(saved)
    optimizer.zero_grad()
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    train(model, optimizer, 1, seed=6)
    small.obeys(handle)
    both = handle.masks["0"] & (saved["0.weight"] != 0)
    assert torch.equal(model[0].weight[both], saved["0.weight"][both])


# --- saved and resumed ----------------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("done", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_in_mid_schedule_bit_for_bit(method: str, done: int) -> None:
    model, optimizer, handle = made(method)
    train(model, optimizer, done)
    file = through_a_file([model.state_dict(), optimizer.state_dict(), handle.state_dict()])
    train(model, optimizer, 8 - done, seed=2)

    again, its_optimizer, its_handle = made(method, seed=3)
    train(again, its_optimizer, 1, seed=9)
    for each, state in zip((again, its_optimizer, its_handle), file, strict=True):
        each.load_state_dict(state)
    assert its_handle.step == done
    train(again, its_optimizer, 8 - done, seed=2)
    assert small.equal(model, again) and handle.history == its_handle.history
    assert str(handle) == str(its_handle)
    assert small.equal(handle.bake(), its_handle.bake())


@pytest.mark.parametrize("method", METHODS)
def test_resumed_in_the_middle_of_gradient_accumulation(method: str) -> None:
    parts = list(small.batches(10, seed=4))

    def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for index in range(first, last):
            small.loss_of(model, parts[index]).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()

    model, optimizer, handle = made(method)
    accumulate(model, optimizer, 0, 5)
    gradients = {name: each.grad for name, each in model.named_parameters()}
    file = through_a_file([model.state_dict(), optimizer.state_dict(), handle.state_dict(), gradients])
    accumulate(model, optimizer, 5, 10)

    again, its_optimizer, its_handle = made(method)
    for each, state in zip((again, its_optimizer, its_handle), file[:3], strict=True):
        each.load_state_dict(state)
    for name, each in again.named_parameters():
        each.grad = file[3][name]
    accumulate(again, its_optimizer, 5, 10)
    assert small.equal(model, again)


def test_the_state_is_a_copy() -> None:
    model, optimizer, handle = made("sr-ste")
    state = handle.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, 2)
    assert all(torch.equal(state["layers"][name]["dense"], before["layers"][name]["dense"]) for name in ("0", "2"))
    handle.load_state_dict(state)
    train(model, optimizer, 2)
    assert torch.equal(state["layers"]["0"]["mask"], before["layers"]["0"]["mask"])


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("parts", [1, 4])
def test_sr_ste_gradient_is_that_of_a_masked_forward(parts: int, scaled: bool) -> None:
    """W gets g + decay (1 - M) W, g being the gradient by W * M, of all parts of a batch; SGD without momentum."""
    torch.manual_seed(0)
    layer, (x, y) = nn.Linear(8, 4, dtype=torch.float64), (torch.randn(8, 8).double(), torch.randn(8, 4).double())
    dense, bias, rate, decay = layer.weight.detach().clone(), layer.bias.detach().clone(), 0.25, 0.125
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    handle = sc.sparsify(layer, "2:4", optimizer, sc.training.SrSte(decay=decay), steps=3)
    for _ in range(3):
        mask = handle.masks[""]
        leaf = (dense * mask).requires_grad_()
        its_bias = bias.clone().requires_grad_()
        assert torch.equal(layer.weight.detach(), dense * mask)
        for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.linear(some, leaf, its_bias) - wanted).square().sum().backward()
            scaler.scale((layer(some) - wanted).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert leaf.grad is not None and its_bias.grad is not None
        dense = dense - rate * (leaf.grad + decay * torch.where(mask, 0.0, dense))
        bias = bias - rate * its_bias.grad
        learned = handle.state_dict()["layers"][""]["dense"]
        torch.testing.assert_close(learned, dense, rtol=1e-13, atol=1e-13)
        assert torch.equal(handle.masks[""], sc.prune_weight(learned, "2:4").mask)
        dense = learned


def test_fixed_masks_take_masked_gradients() -> None:
    model, optimizer, handle = made(steps=1)
    (batch,) = small.batches(1)
    small.loss_of(model, batch).backward()
    want = model[0].weight.grad * handle.masks["0"]  # type: ignore[operator]
    optimizer.step()
    assert torch.equal(model[0].weight.grad, want)  # type: ignore[arg-type]


# --- a loss that is no number ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_leaves_weights_and_the_optimizer_untouched_and_training_goes_on(
    method: str, fused: bool, poison: float
) -> None:
    model = small.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    handle = sc.sparsify(model, "2:4", optimizer, method, steps=8)
    train(model, optimizer, 5)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), handle.state_dict()])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            (small.loss_of(model, next(small.batches(1))) * poison).backward()
            optimizer.step()
    assert len(said) == 1 and "gradients are not finite at step 6" in str(said[0].message)
    now = [model.state_dict(), optimizer.state_dict(), handle.state_dict()]
    assert all(torch.equal(*pair) for pair in zip(tensors(before), tensors(now), strict=True))
    assert all(float(each["step"]) == 5 for each in optimizer.state.values())
    train(model, optimizer, 3)
    assert handle.step == 8
    small.obeys(handle)
    handle.bake()


# --- what it tells --------------------------------------------------------------------------------------------------


def test_flip_rates_are_those_of_the_masks() -> None:
    model, optimizer, handle = made("sr-ste", steps=4)
    assert handle.flip_rate == 0.0 and "masks have not changed yet" in str(handle)
    rates = []
    for seed in range(4):
        before = handle.masks
        optimizer.param_groups[0]["lr"] = 0.1
        train(model, optimizer, 1, seed)
        changed = sum(int((mask != before[name]).sum()) for name, mask in handle.masks.items())
        rates.append(changed / (small.IN * small.HIDDEN + small.HIDDEN * small.OUT))
        assert handle.flip_rate == rates[-1]
    assert max(rates) > 0 and [each.step for each in handle.history] == [1, 2, 3, 4]
    assert [each.flip_rate for each in handle.history] == rates
    assert all(each.density == 0.5 for each in handle.history)
    assert str(handle).splitlines() == [
        "sr-ste: step 4 of 4, 2 layers keep 50.0% of their weights, schedule constant",
        f"the last change of masks flipped {rates[-1]:.2%} of their entries",
    ]
    assert repr(handle) == "<SparseTraining sr-ste, live, step 4 of 4>"


def test_masks_stay_after_the_last_step() -> None:
    model, optimizer, handle = made("sr-ste", steps=2)
    train(model, optimizer, 2)
    before = handle.masks
    optimizer.param_groups[0]["lr"] = 0.5
    train(model, optimizer, 3)
    assert handle.step == 5 and all(torch.equal(mask, before[name]) for name, mask in handle.masks.items())
    small.obeys(handle)
    handle.bake()


def test_empty_weights() -> None:
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = sc.sparsify(model, "2:4", optimizer, "sr-ste", steps=1)
    model(torch.ones(1, 0)).sum().backward()
    optimizer.step()
    small.obeys(handle)
    handle.bake()
